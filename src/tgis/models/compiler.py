"""The process in which PyTorch compiles a network (AOTInductor), so that no other ever does.

python -m tgis.models.compiler DIRECTORY < description

It needs no weights: those of norms come as inputs, and layers and attention are operators of
`opaque`. How many tokens and logits there are stays open, from 0 on, so that one compilation serves
every step.
"""

import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import torch
from torch import Tensor

from tgis.clib import BuildError
from tgis.control import die_with_parent
from tgis.models import opaque
from tgis.models.decoder import TOPOLOGIES, Block, ResidualNorm
from tgis.models.inputs import StepInputs
from tgis.models.kernels import reference
from tgis.models.spec import Activation, DecoderSpec, Norm, Topology
from tgis.models.weights import NormWeights

LIBRARY, OPERATORS = "network.so", "network.json"
"""What a compilation leaves in its directory: code, and which operators it calls."""

_COMPILERS = ("g++", "clang++")
_OPTIONS: dict[str, Any] = {
    "compile_threads": 1,  # else Inductor starts a pool of processes, for one file
    "aot_inductor.check_lowerbound": False,
    "aot_inductor.precompile_headers": False,
    "cpp.dynamic_threads": True,
}

# Blocks read adapters of a step, which are a matter of the operators.
_NO_INPUTS = cast(StepInputs, SimpleNamespace(lora=None))


class Description(msgspec.Struct, frozen=True):
    """All that the code depends on; sizes are those of rows."""

    dtype: str
    num_layers: int
    topology: Topology
    hidden: int
    qkv: int
    attended: int
    mlp: int
    vocab: int
    norm: Norm
    activation: Activation
    gated: bool
    multiplier: float

    @classmethod
    def of(cls, spec: DecoderSpec, dtype: torch.dtype) -> "Description":
        """That of a network which is not split."""
        return cls(
            dtype=str(dtype).removeprefix("torch."),
            num_layers=spec.num_layers,
            topology=spec.topology,
            hidden=spec.hidden_size,
            qkv=(spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim,
            attended=spec.num_heads * spec.head_dim,
            mlp=spec.intermediate_size * (2 if spec.gated_mlp else 1),
            vocab=spec.vocab_size,
            norm=spec.norm,
            activation=spec.activation,
            gated=spec.gated_mlp,
            multiplier=spec.residual_multiplier,
        )

    @property
    def num_norms(self) -> int:
        """Norms of the network, in the order in which they are used."""
        return self.num_layers * (1 if self.topology == "shared" else 2) + 1


@dataclass(frozen=True, slots=True)
class _Layer:
    """Stands for a layer of the decoder."""

    site: int  # its place in `opaque.Step.layers`
    width: int

    def __call__(self, x: Tensor, _lora: Tensor | None) -> Tensor:
        return opaque.layer(x, self.site, self.width)


@dataclass(frozen=True, slots=True)
class _Attention:
    """Stands for the attention of a block."""

    layer: int
    width: int

    def __call__(self, qkv: Tensor, *_: object) -> Tensor:
        return opaque.attention(qkv, self.layer, self.width)


class Traced(torch.nn.Module):
    """The decoder's blocks and head, as the compiler sees them."""

    def __init__(self, about: Description) -> None:
        super().__init__()
        self._about = about

    def forward(self, stream: Tensor, index: Tensor, norms: list[Tensor]) -> Tensor:
        """See `Decoder.network`.

        Args:
            stream: embeddings [T, hidden].
            index: int64 [N], the tokens after which logits are wanted.
            norms: weights (and biases) of all norms.

        Returns:
            Logits, float32 [N, vocab].
        """
        about, weights = self._about, self._norms(norms)
        addition: Tensor | None = None
        stream = stream.clone()
        for layer in range(about.num_layers):
            block = cast(Block, self._block(layer, weights))
            # Attention knows its part of the cache.
            cache = cast(Any, None)
            addition = TOPOLOGIES[about.topology](block, stream, addition, cache, _NO_INPUTS)
        assert addition is not None
        rows, addition = stream.index_select(0, index), addition.index_select(0, index)
        return opaque.head(next(weights)(rows, addition), about.vocab)

    def _norms(self, tensors: list[Tensor]) -> Iterator[ResidualNorm]:
        parts = iter(tensors)
        for weight in parts:
            bias = next(parts) if self._about.norm.bias else None
            yield ResidualNorm(reference, self._about.norm, NormWeights(weight, bias))

    def _block(self, layer: int, norms: Iterator[ResidualNorm]) -> Any:
        about = self._about
        activate = reference.act_mul if about.gated else reference.act
        sites = range(4 * layer, 4 * layer + 4)
        widths = (about.qkv, about.hidden, about.mlp, about.hidden)
        qkv, attention_out, mlp_in, mlp_out = map(_Layer, sites, widths)
        return Block(
            attention_norm=next(norms),
            qkv=cast(Any, qkv),
            attention=cast(Any, _Attention(layer, about.attended)),
            attention_out=cast(Any, attention_out),
            mlp_norm=None if about.topology == "shared" else next(norms),
            mlp_in=cast(Any, mlp_in),
            activation=partial(activate, activation=about.activation),
            mlp_out=cast(Any, mlp_out),
            multiplier=about.multiplier,
            complete=lambda x: x,
        )


def compile_into(about: Description, directory: Path) -> None:
    """Compile a network into `LIBRARY` and `OPERATORS` of a directory.

    Raises:
        BuildError: there is no C++ compiler.
    """
    import torch._inductor
    from torch._inductor import config
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch._inductor.utils import fresh_cache
    from torch.export import Dim, export
    from torch.fx.experimental import _config as shapes

    config.cpp.cxx = (*config.cpp.cxx, *_COMPILERS)  # type: ignore[assignment]
    with TemporaryDirectory(dir=directory) as work, fresh_cache(dir=work), torch.no_grad():
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise BuildError(f"no C++ compiler ({' or '.join(_COMPILERS)}) on the path") from None
        open_sizes = ({0: Dim.DYNAMIC}, {0: Dim.DYNAMIC}, [None] * len(_example(about)[2]))
        # So that 0 and 1 are numbers like all others.
        with shapes.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
            program = export(Traced(about), _example(about), dynamic_shapes=open_sizes)
        options = _OPTIONS | {"aot_inductor.output_path": f"{work}/{LIBRARY}"}
        module = program.module(check_guards=False)
        library = Path(str(torch._inductor.aot_compile(module, _example(about), options=options)))
        (operators,) = library.parent.glob("*.wrapper.json")
        operators.rename(directory / OPERATORS)
        library.rename(directory / LIBRARY)


def _example(about: Description) -> tuple[Tensor, Tensor, list[Tensor]]:
    dtype: torch.dtype = getattr(torch, about.dtype)
    tensors = about.num_norms * (2 if about.norm.bias else 1)
    norms = [torch.ones(about.hidden, dtype=dtype) for _ in range(tensors)]
    return torch.zeros(7, about.hidden, dtype=dtype), torch.tensor([0, 3, 4]), norms


def main() -> int:
    """Entry point."""
    die_with_parent()
    about = msgspec.json.decode(sys.stdin.buffer.read(), type=Description)
    try:
        compile_into(about, Path(sys.argv[1]))
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    except Exception as error:  # whatever a compiler makes of a network
        traceback.print_exc()
        what = str(error).strip().splitlines() or [""]
        print(f"{type(error).__name__}: {what[0]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
