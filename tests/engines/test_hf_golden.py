"""The Transformers engine and our sampler give what TGIS's own server recorded."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.engines.hf_models import load_engine
from tests.sampling import test_golden as golden
from torch import Tensor

from tgis.engines.plan import Row, StepPlan, Want


class Batches:
    """Feeds the recorded rows to an engine, each step only what is new; for `golden.check`."""

    def __init__(self, path: Path, eos: int, start_id: int | None) -> None:
        self.eos = eos
        self._engine = load_engine(path)
        self._start_id = start_id
        self._computed: dict[int, int] = {}  # by slot, the number of the recorded row
        self._slots: dict[int, int] = {}
        config = SimpleNamespace(vocab_size=self._engine.caps.vocab_size)
        self.model = SimpleNamespace(config=config)

    def start(self, row: dict[str, Any]) -> list[int]:
        return golden.prompt_of(row) if self._start_id is None else [self._start_id]

    def logits(self, rows: list[dict[str, Any]], ids: list[list[int]]) -> list[dict[int, Tensor]]:
        """For each row a mapping from its last position to the logits there."""
        slots = [self._slots.setdefault(id(row), len(self._slots)) for row in rows]
        self._engine.release([slot for slot in self._slots.values() if slot not in slots])
        plan = StepPlan([])
        for slot, row, tokens in zip(slots, rows, ids, strict=True):
            start = self._computed.get(slot, 0)
            has_encoder = self._start_id is not None and start == 0
            encoder_ids = golden.prompt_of(row) if has_encoder else None
            plan.rows.append(
                Row(slot, slot, tokens[start:], start, Want.LAST, encoder_ids=encoder_ids)
            )
            self._computed[slot] = len(tokens)
        found = self._engine.forward(plan)
        return [{len(tokens) - 1: scores} for tokens, scores in zip(ids, found, strict=True)]


def recorded(shared_dir: Path, name: str) -> Any:
    return json.loads((shared_dir / "golden" / name).read_text())


@pytest.mark.parametrize("name", ["stories260K", "stories260K-eos"])
def test_decoder_only(shared_dir: Path, name: str) -> None:
    rows = recorded(shared_dir, "tgis_reference.json")[name]
    golden.check(Batches(shared_dir / "models" / name, 2, None), rows, loose=[])  # type: ignore[arg-type]


def test_encoder_decoder(shared_dir: Path) -> None:
    rows = recorded(shared_dir, "tgis_reference_t5.json")
    edge = [
        i for i, row in enumerate(rows) if row["text"] == "Hello" and "typical_p" in row["params"]
    ]
    golden.check(Batches(shared_dir / "models/tiny-t5", 1, 0), rows, loose=edge)  # type: ignore[arg-type]
