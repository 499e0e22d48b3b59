"""A request gets the same tokens alone, in any batch, in chunks, preempted, or from the cache.

With the native engine in float32, on a checkpoint with random weights.
"""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.kit.core_house import House, open_house
from tests.models.twins import CONFIGS, load_engine, random_ids, save_checkpoint

from tgis.engines.base import CacheShape, Engine
from tgis.types import NO_DETAILS, DetailParams, SamplingParams, TokenDetails
from tgis.wire import Add

LENGTH = 128
GREEDY = SamplingParams()
SAMPLED = SamplingParams(do_sample=True, temperature=1.3, top_k=40, top_p=0.95, seed=11)
PENALISED = SamplingParams(do_sample=True, seed=5, repetition_penalty=1.3, typical_p=0.8)
INPUT_DETAILS = DetailParams(logprobs=True, ranks=True, input=True)


def requests() -> list[Add]:
    """Prompts of all lengths, some of which begin alike, one that ends where another goes on."""
    stem = random_ids(0, 70)
    prompts = [
        stem,
        stem + random_ids(1, 9),
        stem[:40] + random_ids(2, 30),
        random_ids(3, 5),
        random_ids(4, 64),
        [7],
    ]
    params = [GREEDY, SAMPLED, PENALISED, GREEDY, SAMPLED, GREEDY]
    details = [NO_DETAILS, NO_DETAILS, INPUT_DETAILS, NO_DETAILS, INPUT_DETAILS, NO_DETAILS]
    return [
        Add(seq_id, prompt, sampling, wanted, 24, math.inf, 0.0)
        for seq_id, (prompt, sampling, wanted) in enumerate(
            zip(prompts, params, details, strict=True)
        )
    ]


class Answers:
    """Tokens and input details by request."""

    def __init__(self, house: House) -> None:
        self.tokens = house.fronts[0].tokens
        self.inputs: dict[int, list[TokenDetails]] = {
            item.seq_id: item.details for out in house.fronts[0].outs for item in out.inputs
        }
        self.counts: Counter[str] = Counter()
        for out in house.fronts[0].outs:
            if out.step is not None:
                self.counts["hits"] += out.step.counts.prefix_hit_tokens
                self.counts["preempted"] += out.step.counts.num_preempted
        assert not house.fronts[0].failed


class Lab:
    """One checkpoint, and engines with empty caches."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        save_checkpoint(directory, CONFIGS["llama"])
        self.alone = self.answers(
            *[[add] for add in requests()], slots=2, tokens=2000, budget=500, caching=False
        )

    def whole(self, num_tokens: int) -> int:
        """Of so many tokens, those that can be shared."""
        return num_tokens

    def engine(self, slots: int, tokens: int) -> Engine:
        """One for as many sequences and tokens."""
        engine = load_engine(self.directory)
        engine.allocate(CacheShape(2 * slots, LENGTH))
        return engine

    def answers(
        self, *waves: list[Add], slots: int, tokens: int, budget: int, caching: bool
    ) -> Answers:
        """Serve the requests of one wave together, wave after wave."""
        engine = self.engine(slots, tokens)
        with open_house(
            self.directory, slots, tokens, budget, engine=engine, caching=caching
        ) as house:
            front = house.connect()
            for wave in waves:
                for add in wave:
                    front.send(add)
                house.turn(2)  # the connection, and then the words
                house.run(front)
            return Answers(house)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # steps are so small that more only wait for each other
    yield Lab(tmp_path_factory.mktemp("llama"))
    torch.set_num_threads(threads)


def same(answers: Answers, alone: Answers) -> None:
    assert answers.tokens == alone.tokens
    assert answers.inputs.keys() == alone.inputs.keys()
    for seq_id, details in answers.inputs.items():
        expected = alone.inputs[seq_id]
        assert [item.rank for item in details] == [item.rank for item in expected]
        for item, other in zip(details, expected, strict=True):
            assert item.logprob == pytest.approx(other.logprob, abs=1e-4)


@pytest.mark.parametrize("budget", [10, 33, 500])
@pytest.mark.parametrize("caching", [False, True])
def test_in_a_batch_and_in_chunks(lab: Lab, budget: int, caching: bool) -> None:
    answers = lab.answers(requests(), slots=6, tokens=2000, budget=budget, caching=caching)
    same(answers, lab.alone)


def test_preempted(lab: Lab) -> None:
    answers = lab.answers(requests(), slots=6, tokens=200, budget=64, caching=False)
    same(answers, lab.alone)
    assert answers.counts["preempted"]


def test_from_the_cache_one_after_the_other(lab: Lab) -> None:
    waves = [[add] for add in requests()]
    answers = lab.answers(*waves, slots=6, tokens=2000, budget=500, caching=True)
    same(answers, lab.alone)
    assert answers.counts["hits"] >= lab.whole(70)


def test_from_the_cache_the_second_time(lab: Lab) -> None:
    """The whole prompts are cached then, and the rows of others that go on differently."""
    again = [
        Add(add.seq_id + 10, add.token_ids, add.sampling, add.details, 24, math.inf, 0.0)
        for add in requests()
    ]
    answers = lab.answers(requests(), again, slots=6, tokens=2000, budget=500, caching=True)
    assert answers.counts["hits"] >= lab.whole(69) + lab.whole(70)
    for seq_id in range(6):
        assert answers.tokens[seq_id + 10] == answers.tokens[seq_id] == lab.alone.tokens[seq_id]


def test_preempted_with_the_cache_full(lab: Lab) -> None:
    answers = lab.answers(requests(), slots=6, tokens=200, budget=64, caching=True)
    same(answers, lab.alone)
    assert answers.counts["preempted"]
    assert answers.counts["hits"]
