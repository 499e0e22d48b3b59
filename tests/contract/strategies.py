"""Random valid requests, for property tests."""

from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from tests.contract.cases import Json

MAX_NEW_TOKENS = 16
PIECES = [
    "Once upon a time",
    " Lily",
    " saw a",
    " big",
    "\n",
    "“Oh",
    " é 😀",
    " the dog",
    ". ",
    "<s>",
    "x",
]
STOPS = [".", " ", "a", "the", "\n", " to", "ed", "e w", ", ", "😀", "ing", "Li", "“"]

texts: SearchStrategy[str] = st.lists(st.sampled_from(PIECES), max_size=5).map("".join)


def optional(**fields: SearchStrategy[Any]) -> SearchStrategy[Json]:
    """A mapping in which each field may be missing."""
    return st.fixed_dictionaries({}, optional=fields)


sampling = st.fixed_dictionaries(
    {"seed": st.integers(0, 2**64 - 1)},
    optional={
        "temperature": st.sampled_from([0.05, 0.3, 0.7, 1.0, 1.5, 4.0]),
        "topK": st.sampled_from([0, 1, 2, 7, 40, 10**6]),
        "topP": st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
        "typicalP": st.sampled_from([0.0, 0.2, 0.6, 0.95, 1.0]),
    },
)
decoding = optional(
    repetitionPenalty=st.sampled_from([0.0, 0.8, 1.0, 1.3, 2.5]),
    lengthPenalty=optional(startIndex=st.integers(0, 12)).flatmap(
        lambda rest: st.sampled_from([1.0, 1.05, 1.5, 10.0]).map(
            lambda decay: rest | {"decayFactor": decay}
        )
    ),
)
details = optional(
    tokenLogprobs=st.booleans(), tokenRanks=st.booleans(), topNTokens=st.integers(0, 10)
)
lists = st.sampled_from([{"generatedTokens": True}, {"inputTokens": True}]) | st.just(
    {"generatedTokens": True, "inputTokens": True}
)


@st.composite
def stoppings(draw: st.DrawFn) -> Json:
    stopping: Json = {"maxNewTokens": draw(st.integers(1, MAX_NEW_TOKENS))}
    if draw(st.booleans()):
        stopping["minNewTokens"] = draw(st.integers(0, stopping["maxNewTokens"]))
    if draw(st.booleans()):
        stopping["stopSequences"] = draw(st.lists(st.sampled_from(STOPS), min_size=1, max_size=4))
    if draw(st.booleans()):
        stopping["includeStopSequence"] = draw(st.booleans())
    return stopping


@st.composite
def params(draw: st.DrawFn) -> Json:
    """Parameters that every input of a few tokens may have."""
    chosen: Json = {"stopping": draw(stoppings()), "decoding": draw(decoding)}
    if draw(st.booleans()):
        chosen |= {"method": "SAMPLE", "sampling": draw(sampling)}
    response = draw(optional(inputText=st.booleans()))
    if draw(st.booleans()):
        response |= draw(lists) | draw(details)
    chosen["response"] = response
    if draw(st.booleans()):
        chosen["truncateInputTokens"] = draw(st.integers(1, 12))
    return chosen
