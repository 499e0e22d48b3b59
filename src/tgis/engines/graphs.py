"""Decoding steps as CUDA graphs: captured at start for some batch sizes, replayed with padding.

A decoding step of a small batch is thousands of short kernels, which the host launches more slowly
than a card computes them. A graph of them is launched at once. It reads its inputs where they were
when it was captured, so each step's are copied there; rows that are missing are filled up with ones
that write to a block of their own, which nobody else reads.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tgis.engines.plan import StepPlan
from tgis.models.inputs import BlockTables, NewTokens, StepInputs

log = logging.getLogger(__name__)

Rotary = tuple[Tensor, Tensor] | None
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""run -> (what computes it anew, from what its inputs hold then; where its result lies)"""


def cuda_capture() -> Capture:
    """Captures by CUDA; all graphs share the memory of their intermediate results."""
    pool = torch.cuda.graph_pool_handle()

    def capture(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # whatever is compiled or allocated once
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            result = run()
        return graph.replay, result

    return capture


def batch_sizes(most: int) -> list[int]:
    """Batch sizes that get a graph: small ones closely, so that little is padded."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, most + 1, 16)]
    return sorted({size for size in sizes if size < most} | {most})


@dataclass(frozen=True, slots=True, eq=False)
class _Graph:
    inputs: StepInputs
    replay: Callable[[], None]
    logits: Tensor


class DecodeGraphs:
    """Steps in which each sequence has one new token, and wants logits after it.

    Args:
        forward: computes a step from its inputs; reads all lengths from tensors.
        spare_block: written by rows that fill a batch up.
        block_tokens: tokens of a block.
        longest: tokens of a sequence at most.
        rotary: see `NewTokens.inputs`.
        device: of the tensors.
    """

    def __init__(
        self,
        forward: Callable[[StepInputs], Tensor],
        spare_block: int,
        block_tokens: int,
        longest: int,
        rotary: Rotary,
        device: torch.device,
    ) -> None:
        self._forward = forward
        self._spare = [spare_block]
        self._block_tokens = block_tokens
        self._longest = longest
        self._rotary = rotary
        self._device = device
        self._graphs: dict[int, _Graph] = {}

    def capture(self, sizes: Sequence[int], capture: Capture) -> None:
        """Capture steps of these sizes, as far as memory reaches; the largest first."""
        for size in sorted(sizes, reverse=True):
            inputs = self._fixed(size)
            blocks = inputs.blocks

            def run(inputs: StepInputs = inputs, blocks: BlockTables | None = blocks) -> Tensor:
                assert blocks is not None
                blocks.prepared.clear()
                return self._forward(inputs)

            try:
                self._graphs[size] = _Graph(inputs, *capture(run))
            except (torch.OutOfMemoryError, MemoryError) as error:
                log.warning("no memory for a graph of %d sequences: %s", size, error)
        captured = ", ".join(map(str, sorted(self._graphs)))
        log.info("decoding is captured for batches of %s", captured or "no size")

    def takes(self, plan: StepPlan) -> bool:
        """Whether this is such a step, of so many sequences that there is a graph, without LoRA."""
        return len(plan.rows) <= max(self._graphs, default=0) and all(
            len(row.token_ids) == row.num_logits == 1 and not row.lora for row in plan.rows
        )

    def run(self, tokens: NewTokens, num_rows: int) -> Tensor:
        """The logits of a step of so many sequences, [num_rows, vocab]; valid until the next."""
        size = min(size for size in self._graphs if size >= num_rows)
        graph = self._graphs[size]
        for _ in range(size - num_rows):
            tokens.add(0, [0], 0, 1, block_table=self._spare)
        _copy(graph.inputs, tokens.inputs(self._rotary))
        graph.replay()
        return graph.logits[:num_rows]

    def _fixed(self, size: int) -> StepInputs:
        """Inputs of which the tensors stay where they are, with room for the longest tables."""
        tokens = NewTokens(self._block_tokens, self._device)
        for _ in range(size):
            tokens.add(0, [0], 0, 1, block_table=self._spare)
        inputs = tokens.inputs(self._rotary)
        assert inputs.blocks is not None
        width = -(-self._longest // self._block_tokens)
        tables = inputs.blocks.tables.new_zeros(size, width)
        tables[:, :1] = inputs.blocks.tables
        blocks = replace(
            inputs.blocks, tables=tables, num_new=[1] * size, num_keys=[self._longest] * size
        )
        return replace(inputs, blocks=blocks)


def _copy(fixed: StepInputs, inputs: StepInputs) -> None:
    """Put a step's inputs where the graph reads them; `slots` and `zeros` are always the same."""
    pairs = list(zip(fixed.tensors(), inputs.tensors(), strict=True))
    assert fixed.blocks is not None
    assert inputs.blocks is not None
    pairs.append((fixed.blocks.places, inputs.blocks.places))
    tables = inputs.blocks.tables
    pairs.append((fixed.blocks.tables[:, : tables.shape[1]], tables))
    for target, source in pairs:
        if target is not None and source is not None:
            target.copy_(source)
