"""Plain transformers passes with our sampler equal what TGIS's own server recorded."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaForCausalLM, T5ForConditionalGeneration

from tgis.sampling import Choice, Sampler, input_details
from tgis.types import DetailParams, SamplingParams, TokenDetails

DETAILS = DetailParams(logprobs=True, ranks=True, top_n=3, output=True, input=True)
UNDERFLOW = -103.0  # below about this a probability is zero in float32
Row = dict[str, Any]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The models are tiny: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def to_params(recorded: dict[str, Any]) -> SamplingParams:
    start, decay = recorded.get("lp", (0, 1.0))
    return SamplingParams(
        do_sample="temperature" in recorded,
        temperature=recorded.get("temperature", 1.0),
        top_k=recorded.get("top_k", 0),
        top_p=recorded.get("top_p", 1.0),
        typical_p=recorded.get("typical_p", 1.0),
        seed=recorded.get("seed", 0),
        repetition_penalty=recorded.get("rep", 1.0),
        length_penalty_start=start,
        length_penalty_decay=decay,
        min_new_tokens=recorded.get("min_new", 0),
    )


def prompt_of(row: Row) -> list[int]:
    """The recorded prompt; tokenising and truncating are tested elsewhere."""
    return [token[0] for token in row["input"]]


def padded(sequences: list[list[int]]) -> Tensor:
    return pad_sequence([torch.tensor(ids) for ids in sequences], batch_first=True)


class Decoder:
    """A llama that sees every text anew at each step; padding on the right is in no one's past."""

    eos = 2

    def __init__(self, path: Path) -> None:
        self.model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def start(self, row: Row) -> list[int]:
        return prompt_of(row)

    def logits(self, rows: list[Row], ids: list[list[int]]) -> Tensor:
        with torch.inference_mode():
            return self.model(padded(ids)).logits


class EncoderDecoder:
    """A T5, likewise."""

    eos = 1

    def __init__(self, path: Path) -> None:
        self.model = T5ForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()

    def start(self, row: Row) -> list[int]:
        return [self.model.config.decoder_start_token_id]

    def logits(self, rows: list[Row], ids: list[list[int]]) -> Tensor:
        prompts = [prompt_of(row) for row in rows]
        with torch.inference_mode():
            return self.model(
                input_ids=padded(prompts),
                attention_mask=padded([[1] * len(prompt) for prompt in prompts]),
                decoder_input_ids=padded(ids),
            ).logits


def generate(model: Decoder | EncoderDecoder, rows: list[Row]) -> list[list[Choice]]:
    """All rows in one batch; each takes as many steps as when it was recorded."""
    sampler = Sampler(model.model.config.vocab_size, (model.eos,))
    ids = [list(model.start(row)) for row in rows]
    choices: list[list[Choice]] = [[] for _ in rows]
    for i, row in enumerate(rows):
        sampler.add(i, to_params(row["params"]), DETAILS, ids[i])
    while live := [i for i, row in enumerate(rows) if len(choices[i]) < len(row["tokens"])]:
        logits = model.logits([rows[i] for i in live], [ids[i] for i in live])
        last = torch.stack([row[len(ids[i]) - 1] for i, row in zip(live, logits, strict=True)])
        for i, choice in zip(live, sampler.sample(live, last), strict=True):
            ids[i].append(choice.token_id)
            choices[i].append(choice)
    return choices


def assert_details(ours: TokenDetails | None, recorded: dict[str, Any]) -> None:
    """Equal but for candidates whose probability is zero in float32.

    They are missing in the recording, since there a top-p row in the batch passed all its rows
    through the filter. What a row gets here does not depend on the batch: it keeps them.
    """
    assert ours is not None
    assert ours.logprob == pytest.approx(recorded["logprob"], abs=1e-3)
    assert ours.rank == recorded["rank"]
    ids, logprobs = zip(*recorded["top"], strict=True)
    shown = [(i, logprob) for i, logprob in ours.top if i in ids or logprob > UNDERFLOW]
    assert [i for i, _ in shown] == list(ids)
    assert [logprob for _, logprob in shown] == pytest.approx(list(logprobs), abs=1e-3)


def check(model: Decoder | EncoderDecoder, rows: list[Row], loose: list[int]) -> None:
    """`loose` rows bind in their tokens only."""
    for i, (row, ours) in enumerate(zip(rows, generate(model, rows), strict=True)):
        assert [c.error for c in ours] == [None] * len(ours)
        assert [c.token_id for c in ours] == [t["id"] for t in row["tokens"]], row["params"]
        if i not in loose:
            for choice, recorded in zip(ours, row["tokens"], strict=True):
                assert_details(choice.details, recorded)


def check_input(model: Decoder, rows: list[Row]) -> None:
    """Input details, in two chunks, equal the recorded ones."""
    prompts = [prompt_of(row) for row in rows]
    for row, prompt, raw in zip(rows, prompts, model.logits(rows, prompts), strict=True):
        half = len(prompt) // 2
        ours = [
            *input_details(raw[:half], prompt[1 : half + 1], DETAILS),
            *input_details(raw[half : len(prompt) - 1], prompt[half + 1 :], DETAILS),
        ]
        for entry, (_, logprob, rank) in zip(ours, row["input"][1:], strict=True):
            assert entry.logprob == pytest.approx(logprob, abs=1e-3)
            assert entry.rank == rank


@pytest.mark.parametrize("name", ["stories260K", "stories260K-eos"])
def test_decoder_only(shared_dir: Path, name: str) -> None:
    rows = json.loads((shared_dir / "golden/tgis_reference.json").read_text())[name]
    assert len(rows) == 78
    model = Decoder(shared_dir / "models" / name)
    check(model, rows, loose=[])
    check_input(model, rows)


def test_encoder_decoder(shared_dir: Path) -> None:
    rows = json.loads((shared_dir / "golden/tgis_reference_t5.json").read_text())
    assert len(rows) == 32
    edge = [
        i for i, row in enumerate(rows) if row["text"] == "Hello" and "typical_p" in row["params"]
    ]
    check(EncoderDecoder(shared_dir / "models/tiny-t5"), rows, loose=edge)
