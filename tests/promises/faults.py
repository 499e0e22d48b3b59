"""Parts of a server that fail on certain requests; `tests/kit/site` installs them.

Each fault has a mark that its request carries.
"""

import sys
from typing import Any

TOKENIZER = "poison of the tokenizer"  # a text
ENGINE = 37  # tokens of a prompt
SAMPLER, DETOKENIZER = 666_001, 666_002  # seeds
ADAPTER = "poison"  # an id
_AFTER = 3  # tokens


class PoisonError(Exception):
    """What is thrown."""


def install() -> None:
    """In whatever process this is."""
    for module, fault in (("tgis.front", _front), ("tgis.core", _core)):
        if module in sys.orig_argv:
            fault()


def _front() -> None:
    from tgis.front import streams, tokenize

    encode = tokenize.TextTokenizer._encode

    def poisoned_encode(self: Any, text: str, truncate: int) -> Any:
        if TOKENIZER in text:
            raise PoisonError(text)
        return encode(self, text, truncate)

    tokenize.TextTokenizer._encode = poisoned_encode  # type: ignore[method-assign]
    push = streams.Stream.push

    def poisoned_push(self: Any, out: Any) -> None:
        if self.job.sampling.seed == DETOKENIZER and self.num_generated == _AFTER:
            self._text = None  # what it does next fails
        push(self, out)

    streams.Stream.push = poisoned_push  # type: ignore[method-assign]


def _core() -> None:
    from tgis.core import adapters
    from tgis.engines import native
    from tgis.sampling import sampler

    sample = sampler.Sampler.sample

    def poisoned_sample(self: Any, seq_ids: Any, logits: Any) -> Any:
        states = [self._sequences[seq_id] for seq_id in seq_ids]
        if any(s.params.seed == SAMPLER and s.num_generated >= _AFTER for s in states):
            raise PoisonError
        return sample(self, seq_ids, logits)

    sampler.Sampler.sample = poisoned_sample  # type: ignore[method-assign]
    load = adapters.load

    def poisoned_load(store: Any, adapter_id: str, *rest: Any) -> Any:
        if adapter_id == ADAPTER:
            raise PoisonError(adapter_id)
        return load(store, adapter_id, *rest)

    adapters.load = poisoned_load  # type: ignore[assignment]
    forward = native.NativeEngine.forward

    def poisoned_forward(self: Any, plan: Any) -> Any:
        if any(row.start == 0 and len(row.token_ids) == ENGINE for row in plan.rows):
            raise PoisonError
        return forward(self, plan)

    native.NativeEngine.forward = poisoned_forward  # type: ignore[method-assign]
