"""A decoder-only network of Transformers, run block by block over whole texts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from tgis.errors import ModelError


class _Reached(Exception):
    """The forward pass has come to where it was to end."""


class Call(NamedTuple):
    """How the network calls a block, besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class Blocks:
    """The blocks of a network, and what it calls them with.

    Args:
        model: a `PreTrainedModel` for causal language modelling.
        texts: token ids [T] of equal length; blocks are called alike for all of them.

    Raises:
        ModelError: no list of blocks is found in it.
    """

    def __init__(self, model: Any, texts: Sequence[Tensor]) -> None:
        self._model = model
        self.name, self._blocks = _longest_list(model)
        self._calls = self._watch_calls(texts[0])
        self.hidden = [self._embed(text) for text in texts]  # before block `self.at`
        self.at = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def layers(self) -> dict[str, nn.Module]:
        """The next block's linear layers, by their names in the model."""
        prefix = f"{self.name}.{self.at}"
        return {
            f"{prefix}.{name}": module
            for name, module in self._blocks[self.at].named_modules()
            if isinstance(module, nn.Linear | Conv1D)
        }

    def inputs(self, told: Mapping[str, Callable[[Tensor], None]]) -> None:
        """Run the next block, and tell layers' inputs to those that want them, by name."""
        layers = self.layers()
        handles = [
            layers[name].register_forward_pre_hook(lambda _, args, tell=tell: tell(args[0]))
            for name, tell in told.items()
        ]
        try:
            for hidden in self.hidden:
                self._run(hidden)
        finally:
            for handle in handles:
                handle.remove()

    def advance(self) -> None:
        """Replace the hidden states by the next block's output."""
        self.hidden = [self._run(hidden) for hidden in self.hidden]
        self.at += 1

    def _run(self, hidden: Tensor) -> Tensor:
        call = self._calls[self.at]
        y: Any = self._blocks[self.at](hidden, *call.args, **call.kwargs)
        output: Tensor = y[0] if isinstance(y, tuple) else y
        return output

    def _watch_calls(self, text: Tensor) -> list[Call]:
        calls: list[Call] = []

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            others = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            calls.append(Call(args[1:], others))

        with _hooks(self._blocks, note):
            self._model(text[None], use_cache=False)
        return calls

    def _embed(self, text: Tensor) -> Tensor:
        reached: list[Tensor] = []

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            reached.append(args[0] if args else kwargs["hidden_states"])
            raise _Reached

        with _hooks(self._blocks[:1], note):
            try:
                self._model(text[None], use_cache=False)
            except _Reached:
                return reached[0]
        raise ModelError("the network does not call its first block")


@contextmanager
def _hooks(blocks: Any, note: Callable[..., None]) -> Iterator[None]:
    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _longest_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and any(isinstance(inner, nn.Linear | Conv1D) for inner in module.modules())
    ]
    if not lists:
        raise ModelError("the network has no list of blocks with linear layers")
    return max(lists, key=lambda entry: sum(p.numel() for p in entry[1].parameters()))


def matrix_of(layer: nn.Module) -> Tensor:
    """A layer's weight as [out, in]; a view."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.T if isinstance(layer, Conv1D) else weight


def perplexity(model: Any, texts: Sequence[Tensor]) -> float:
    """exp of the mean loss of each token, but the first of each text [T], after those before."""
    total, count = 0.0, 0
    for text in texts:
        logits = model(text[None], use_cache=False).logits[0, :-1].float()
        total += float(functional.cross_entropy(logits, text[1:], reduction="sum"))
        count += len(text) - 1
    return float(torch.tensor(total / count).exp())
