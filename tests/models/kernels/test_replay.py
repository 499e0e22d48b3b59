"""A replayed step computes what Python's calls compute."""

import gc

import pytest
import torch

from tgis.models import kernels
from tgis.models.kernels import build, linear

try:
    build.find_or_compile()
except build.BuildError as error:
    pytest.skip(str(error), allow_module_level=True)

HIDDEN, HEADS, KV_HEADS, DIM, LAYERS = 128, 4, 2, 64, 3
needs_amx = pytest.mark.skipif(
    build.cpu_target().name != "amx", reason="few rows of a linear layer are ours only on AMX"
)


class Network:
    """A small decoder: every kernel, and rows of the stream that are added to in place."""

    def __init__(self, generator: torch.Generator) -> None:
        def layer(out: int, width: int) -> linear.Linear:
            weight = torch.randn((out, width), generator=generator) * width**-0.5
            return linear.bf16_linear(weight.bfloat16())

        qkv = (HEADS + 2 * KV_HEADS) * DIM
        shapes = [(qkv, HIDDEN), (HIDDEN, HEADS * DIM), (512, HIDDEN), (HIDDEN, 256)]
        self.layers = [[layer(*shape) for shape in shapes] for _ in range(LAYERS)]
        shape = (2, LAYERS, 40, KV_HEADS, 64, DIM)
        self.k, self.v = torch.randn(shape, generator=generator).bfloat16().unbind()
        self.norm = torch.ones(HIDDEN).bfloat16()

    def step(self, stream, angle, slots, positions, q_start, kv_len):
        added = None
        for i, (qkv, out, gate_up, down) in enumerate(self.layers):
            x = qkv(kernels.rms_norm(stream, self.norm, 1e-5, added))
            caches = (self.k[i], self.v[i])
            q = kernels.rope_store(x, angle, angle, *caches, slots, positions, HEADS, KV_HEADS)
            x = out(kernels.attention(q, *caches, slots, q_start, kv_len, 0.125))
            x = kernels.rms_norm(stream, self.norm, 1e-5, x)
            added = down(kernels.act_mul(gate_up(x), "silu"))
        return kernels.rms_norm(stream, self.norm, 1e-5, added)


def inputs(rows: int, generator: torch.Generator):
    lengths = torch.randint(1, 60, (rows,), generator=generator).int()
    return (
        torch.randn((rows, HIDDEN), generator=generator).bfloat16(),
        torch.randn((rows, DIM // 2), generator=generator),
        torch.randperm(40, generator=generator)[:rows].int(),
        lengths - 1,
        torch.arange(rows + 1).int(),
        lengths,
    )


@needs_amx
def test_replays_equal_calls(generator) -> None:
    network = Network(generator)
    replayed = kernels.replayed(network.step)
    for rows in (1, 5, 20, 5, 1, 1, 20, 33, 5):
        step = inputs(rows, generator)
        k, v = network.k.clone(), network.v.clone()
        expected = network.step(step[0].clone(), *step[1:])
        caches = network.k.clone(), network.v.clone()
        network.k.copy_(k)
        network.v.copy_(v)
        gc.collect()
        torch.full((1 << 16,), 7.0)  # memory that a recording wrongly gave back would be in use
        assert torch.equal(replayed(rows, *step), expected)
        assert torch.equal(network.k, caches[0])
        assert torch.equal(network.v, caches[1])
    assert all(recorded is not None for recorded in replayed._recorded.values())


@needs_amx
def test_recordings_share_their_memory(generator) -> None:
    network = Network(generator)
    replayed = kernels.replayed(network.step)

    def used() -> int:
        return sum(size * len(blocks) for size, blocks in replayed._memory._blocks.items())

    replayed(32, *inputs(32, generator))
    before = used()
    for rows in (1, 2, 3, 30, 31):
        replayed(rows, *inputs(rows, generator))
    assert used() <= 2 * before


def test_a_function_with_foreign_operators_is_called_each_time() -> None:
    calls = []

    def function(x):
        calls.append(1)
        return kernels.act(x, "relu") + 1

    replayed = kernels.replayed(function)
    for value in (1.0, 2.0, -3.0):
        assert replayed(0, torch.full((2, 8), value)).tolist() == [[max(value, 0) + 1] * 8] * 2
    assert len(calls) == 3


def test_a_recorded_function_is_not_called_again() -> None:
    calls = []

    def function(x):
        calls.append(1)
        return kernels.act(kernels.act(x, "relu").view(1, -1), "relu")

    replayed = kernels.replayed(function)
    for value in (1.0, 2.0, -3.0):
        assert replayed(0, torch.full((2, 8), value)).tolist() == [[max(value, 0)] * 16]
    assert len(calls) == 1


def test_other_shapes_for_a_key_are_refused() -> None:
    replayed = kernels.replayed(lambda x: kernels.act(x, "relu"))
    replayed(0, torch.zeros(2, 8))
    for wrong in (torch.zeros(3, 8), torch.zeros(2, 8).bfloat16(), torch.zeros(8, 2).T):
        with pytest.raises(ValueError, match="recorded"):
            replayed(0, wrong)


def test_errors_of_a_replayed_kernel_are_raised() -> None:
    cache = torch.zeros(2, 1, 4, 8)

    def function(x, slots):
        return kernels.rope_store(x, None, None, cache, cache, slots, slots, 1, 1)

    replayed = kernels.replayed(function)
    replayed(0, torch.zeros(1, 24), torch.zeros(1).int())
    with pytest.raises(IndexError, match="outside"):
        replayed(0, torch.zeros(1, 24), torch.full((1,), 2).int())


def test_the_twin_just_calls() -> None:
    from tgis.models.kernels import reference

    assert reference.replayed(lambda x: x)(3, torch.ones(1)).item() == 1
