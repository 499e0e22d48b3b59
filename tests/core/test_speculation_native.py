"""Served with drafts and without, the demo model says the same: tokens, details, ends."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kit.core_house import Front, open_house

from tgis.core.draft_model import DraftModel
from tgis.core.drafts import Drafter, PromptLookup
from tgis.core.speculation import Speculation
from tgis.core.step_costs import StepCosts
from tgis.demo import model_dir
from tgis.engines import native
from tgis.engines.base import CacheShape
from tgis.engines.native import NativeEngine
from tgis.types import DetailParams, FinishReason, SamplingParams, TokenDetails
from tgis.wire import Abort, Add

LENGTH = 160
SLOTS = 4
TEXTS = [
    "Tom has a red ball. Lily has a blue hat. Tom has a red ball. Lily has",
    "Once upon a time there was a little dog. Once upon a time there was",
    "the cat and the dog and the cat and the dog and the cat",
    "One day",
    "She said no. He said no. She said no. He said",
]


@dataclass
class Lab:
    """Two engines of one model, and prompts."""

    main: NativeEngine
    small: NativeEngine
    prompts: list[list[int]]
    eos: list[int]
    directory: Path

    def answers(self, adds: list[Add], drafts: str, tokens: int, cancelled: list[int]) -> Front:
        self.main.allocate(CacheShape(2 * SLOTS, LENGTH))
        speculation = Speculation(self.drafter(drafts), StepCosts([1], [0.0]), 15, 16, 128)
        with open_house(
            self.directory,
            SLOTS,
            tokens,
            48,
            engine=self.main,
            speculation=speculation,
            eos=self.eos,
        ) as house:
            front = house.connect()
            for add in adds:
                front.send(add)
            house.turn(9)
            front.send(Abort(cancelled))
            house.run(front)
            return front

    def drafter(self, drafts: str) -> Drafter | None:
        if drafts == "prompt-lookup":
            return PromptLookup()
        if drafts == "model":
            shape = CacheShape(16, LENGTH)
            self.small.allocate(shape)
            return DraftModel(self.small, shape, self.main.caps.vocab_size, 0.0)
        return None


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    from tokenizers import Tokenizer

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    path = model_dir()
    config = json.loads((path / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    engines = [native.load(path, config, torch.float32) for _ in range(2)]
    prompts = [tokenizer.encode(text).ids for text in TEXTS]
    # A second token that ends sequences, one that stories are full of.
    eos = [config["eos_token_id"], tokenizer.encode(" said").ids[-1]]
    yield Lab(engines[0], engines[1], prompts, eos, tmp_path_factory.mktemp("core"))
    torch.set_num_threads(threads)


GREEDY = st.builds(
    SamplingParams,
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.2]),
    length_penalty_start=st.integers(0, 6),
    length_penalty_decay=st.sampled_from([1.0, 1.0, 1.3]),
    min_new_tokens=st.sampled_from([0, 0, 5, 20]),
)
SAMPLED = st.builds(
    SamplingParams,
    do_sample=st.just(True),
    temperature=st.sampled_from([0.3, 1.0]),
    top_k=st.sampled_from([0, 3, 40]),
    top_p=st.sampled_from([1.0, 0.7]),
    typical_p=st.sampled_from([1.0, 0.6]),
    seed=st.integers(0, 9),
    repetition_penalty=st.sampled_from([1.0, 1.1]),
    min_new_tokens=st.sampled_from([0, 7]),
)
DETAILS = st.builds(
    DetailParams,
    logprobs=st.booleans(),
    ranks=st.booleans(),
    top_n=st.integers(0, 3),
    output=st.booleans(),
    input=st.booleans(),
)


def close(one: TokenDetails | None, other: TokenDetails | None) -> bool:
    """Equal but for rounding."""
    if one is None or other is None:
        return one is other
    if [token for token, _ in one.top] != [token for token, _ in other.top]:
        return False
    values, others = (
        [item.logprob, *(logprob for _, logprob in item.top)] for item in (one, other)
    )
    near = all(map(partial(math.isclose, abs_tol=1e-4), values, others))
    return near and one.rank == other.rank


def check(plain: Front, drafted: Front, adds: list[Add], cancelled: list[int]) -> None:
    inputs = [
        {item.seq_id: item.details for out in front.outs for item in out.inputs}
        for front in (plain, drafted)
    ]
    for add in adds:
        one, other = plain.tokens.get(add.seq_id, []), drafted.tokens.get(add.seq_id, [])
        length = min(len(one), len(other)) if add.seq_id in cancelled else len(one)
        assert other[:length] == one[:length]
        details = [front.details.get(add.seq_id, [])[:length] for front in (plain, drafted)]
        assert all(map(close, *details))
        if add.seq_id not in cancelled:
            assert len(other) == len(one)
            assert drafted.finish[add.seq_id] is plain.finish[add.seq_id]
            noted = [notes.get(add.seq_id, []) for notes in inputs]
            assert len(noted[0]) == len(noted[1])
            assert all(map(close, *noted))
    assert not plain.failed
    assert not drafted.failed


@pytest.mark.parametrize("drafts", ["prompt-lookup", "model"])
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_the_same_whatever_is_asked_for(lab: Lab, drafts: str, data: st.DataObject) -> None:
    asked = data.draw(
        st.lists(
            st.tuples(st.integers(0, 4), GREEDY | SAMPLED, DETAILS, st.integers(1, 50)),
            min_size=1,
            max_size=6,
        )
    )
    tokens = data.draw(st.sampled_from([256, 2000]))
    cancelled = sorted(data.draw(st.sets(st.integers(0, 5), max_size=1)))
    adds = [
        Add(i, lab.prompts[number], sampling, details, max_new, math.inf, 0.0)
        for i, (number, sampling, details, max_new) in enumerate(asked)
    ]
    plain = lab.answers(adds, "off", tokens, cancelled)
    check(plain, lab.answers(adds, drafts, tokens, cancelled), adds, cancelled)


@pytest.mark.parametrize("drafts", ["prompt-lookup", "model"])
def test_it_does_speculate(lab: Lab, drafts: str) -> None:
    """The demo model copies some; and it knows itself what it will say."""
    adds = [
        Add(i, prompt, SamplingParams(min_new_tokens=60), DetailParams(), 60, math.inf, 0.0)
        for i, prompt in enumerate(lab.prompts)
    ]
    plain, drafted = (lab.answers(adds, source, 2000, []) for source in ("off", drafts))
    check(plain, drafted, adds, [])
    assert set(drafted.finish.values()) <= {FinishReason.EOS_TOKEN, FinishReason.MAX_TOKENS}
    num_accepted = sum(out.step.drafts.num_accepted for out in drafted.outs if out.step)
    assert num_accepted > (10 if drafts == "prompt-lookup" else 200)
    assert len(drafted.outs) < len(plain.outs)
