"""What TGIS's own server answered: `golden/` of the shared directory."""

import json
from pathlib import Path
from typing import Any

import pytest

LOGPROB_TOLERANCE = 1e-3
ZERO_LOGPROB = -103.0  # below about this, exp of it is zero in float32

Row = dict[str, Any]


def recorded_rows(shared_dir: Path, model: str) -> list[Row]:
    """The rows of one model; none if nothing was recorded with it."""
    golden = shared_dir / "golden"
    if model == "tiny-t5":
        rows: list[Row] = json.loads((golden / "tgis_reference_t5.json").read_text())
        return rows
    return list(json.loads((golden / "tgis_reference.json").read_text()).get(model, []))


def is_on_edge(row: Row) -> bool:
    """One recorded row sits on a rounding boundary: its tokens bind, its logprobs do not."""
    return row["text"] == "Hello" and "typical_p" in row["params"]


def candidates_bind(row: Row) -> bool:
    """Not where typical-p cuts among 32,000 nearly equal probabilities (tiny-t5): rounding decides
    whether a candidate stays, and shifts the logprobs of the others by less than the tolerance.
    """
    return row["params"].get("typical_p") != 0.7


def request_of(row: Row) -> dict[str, Any]:
    """A recorded row as the request that a client would send."""
    given = dict(row["params"])
    sampling = {
        name: given[name]
        for name in ("temperature", "top_k", "top_p", "typical_p", "seed")
        if name in given
    }
    decoding: dict[str, Any] = {}
    if "rep" in given:
        decoding["repetition_penalty"] = given["rep"]
    if "lp" in given:
        start, decay = given["lp"]
        decoding["length_penalty"] = {"start_index": start, "decay_factor": decay}
    return {
        "requests": [{"text": row["text"]}],
        "params": {
            "method": "SAMPLE" if "temperature" in given else "GREEDY",
            "sampling": sampling,
            "decoding": decoding,
            "stopping": {
                "max_new_tokens": row["max_new"],
                "min_new_tokens": given.get("min_new", 0),
            },
            "response": {
                "generated_tokens": True,
                "input_tokens": True,
                "token_logprobs": True,
                "token_ranks": True,
                "top_n_tokens": 3,
            },
            "truncate_input_tokens": row["truncate"],
        },
    }


def check_rank(found: int, recorded: int) -> None:
    """Equal, but for tokens so far down that their neighbours are as near as rounding."""
    assert abs(found - recorded) <= recorded // 1000


def check_top(found: list[tuple[Any, float]], recorded: list[tuple[Any, float]]) -> None:
    """The same (token, logprob) pairs in a right order; equal ones may swap.

    Candidates whose probability is zero in float32 are missing in the recording: there a batch
    with some top-p row passed every row through the filter. Alone, a row keeps them.
    """
    by_id = dict(recorded)
    found = [(i, logprob) for i, logprob in found if i in by_id or logprob > ZERO_LOGPROB]
    assert {token for token, _ in found} == set(by_id)
    for token, logprob in found:
        assert logprob == pytest.approx(by_id[token], abs=LOGPROB_TOLERANCE)
    values = [logprob for _, logprob in found]
    assert values == sorted(values, reverse=True)
