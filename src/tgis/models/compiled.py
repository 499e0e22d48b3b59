"""A decoder's blocks and head as one compiled function (`PT2_COMPILE`).

The code is made by `compiler` in a process of its own, and kept on disk under a digest of all that
it depends on. This process only loads it: no graph is traced here, there are no guards that a step
could fail, and so nothing can be compiled while serving.
"""

import hashlib
import logging
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import msgspec
import torch
from torch import Tensor

from tgis.clib import BuildError
from tgis.control import how_ended
from tgis.models import compiler, opaque
from tgis.models.compiler import LIBRARY, OPERATORS, Description
from tgis.models.decoder import Decoder, ResidualNorm
from tgis.models.inputs import StepInputs
from tgis.models.kernels.build import cpu_flags
from tgis.models.kv_cache import LayerCache

log = logging.getLogger(__name__)

_SCRATCH = "making-"
_SUM = "sha256"
_LONG_DEAD_SECONDS = 3600
_SOURCES = ("compiler.py", "opaque.py", "decoder.py", "kernels/reference.py")


class Cache(Protocol):
    """Keys and values of all layers, in any layout."""

    @property
    def layers(self) -> Sequence[LayerCache]:
        """One for each."""


class Compiled:
    """See `decoder.Network`.

    Args:
        library: compiled for such a decoder.

    Raises:
        BuildError: it cannot be loaded.
    """

    def __init__(self, decoder: Decoder, library: Path) -> None:
        blocks = decoder.blocks
        try:
            self._run = torch._C._aoti.AOTIModelContainerRunnerCpu(str(library), 1).run
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise BuildError(f"compiled code cannot be loaded: {reason}") from None
        norms = [norm for block in blocks for norm in (block.attention_norm, block.mlp_norm)]
        self._norms = [x for norm in [*norms, decoder.final_norm] for x in _tensors(norm)]
        parts = ((b.qkv, b.attention_out, b.mlp_in, b.mlp_out) for b in blocks)
        self._layers = [layer for part in parts for layer in part]
        self._head = decoder.head
        self._attention = [block.attention for block in blocks]

    def __call__(self, stream: Tensor, inputs: StepInputs, cache: Cache) -> Tensor:
        """Blocks and head, [T, hidden] -> [N, vocab]."""
        step = opaque.Step(self._layers, self._head, self._attention, cache.layers, inputs)
        with opaque.under_way(step):
            return self._run([stream, inputs.logits_index, *self._norms])[0]


def _tensors(norm: ResidualNorm | None) -> list[Tensor]:
    return [x for x in norm.weights if x is not None] if norm is not None else []


def compiled(decoder: Decoder, directory: Path) -> tuple[Compiled, bool]:
    """A decoder's network, and whether it had to be compiled.

    Args:
        directory: where compiled code is kept; where it cannot be written, nothing is.

    Raises:
        BuildError: it cannot be had; `str()` says why.
    """
    about = _describe(decoder)
    kept = directory / _digest(about)
    if kept.is_dir():
        if _is_whole(kept):
            return Compiled(decoder, kept / LIBRARY), False
        log.warning("%s is damaged, and is made anew", kept)
        shutil.rmtree(kept, ignore_errors=True)
    with _scratch(directory) as scratch:
        made = scratch / "network"
        try:
            made.mkdir()
            _compile(about, made)
            (made / _SUM).write_text(_sum(made))
        except OSError as error:
            raise BuildError(f"{made}: {error.strerror}") from None
        return Compiled(decoder, _keep(made, kept) / LIBRARY), True


def _describe(decoder: Decoder) -> Description:
    if decoder.group.shard.world_size > 1:
        raise BuildError("a model that is split is not compiled")
    if (device := decoder.final_norm.weights.weight.device.type) != "cpu":
        raise BuildError(f"nothing is compiled for {device}")
    return Description.of(decoder.spec, decoder.dtype)


def _digest(about: Description) -> str:
    """The name under which code is kept. It is made for this very CPU."""
    digest = hashlib.sha256(msgspec.json.encode(about))
    digest.update(f"{torch.__version__} {torch.version.git_version}\0{cpu_flags()}".encode())
    for source in _SOURCES:
        digest.update((Path(__file__).parent / source).read_bytes())
    return digest.hexdigest()[:32]


def _is_whole(kept: Path) -> bool:
    """Whether files are what was written; to load a library that is cut off kills the process."""
    try:
        return (kept / _SUM).read_text() == _sum(kept)
    except OSError:
        return False


def _sum(directory: Path) -> str:
    files = b"".join((directory / name).read_bytes() for name in (LIBRARY, OPERATORS))
    return hashlib.sha256(files).hexdigest()


@contextmanager
def _scratch(directory: Path) -> Iterator[Path]:
    """A directory in `directory`, or elsewhere if that cannot be written; removed in the end."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _clear(directory)
        scratch = tempfile.TemporaryDirectory(dir=directory, prefix=_SCRATCH)
    except OSError as error:
        log.info("%s: %s; what is compiled is not kept", directory, error.strerror)
        scratch = tempfile.TemporaryDirectory(prefix="tgis-")
    with scratch as name:
        yield Path(name)


def _clear(directory: Path) -> None:
    """Remove what compilations have left that were killed."""
    for path in directory.glob(f"{_SCRATCH}*"):
        with suppress(FileNotFoundError):  # others do the same
            if time.time() - path.stat().st_mtime > _LONG_DEAD_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _compile(about: Description, into: Path) -> None:
    command = [sys.executable, "-m", compiler.__name__, str(into)]
    given = msgspec.json.encode(about)
    done = subprocess.run(command, input=given, capture_output=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        log.debug("the compiler said:\n%s", "\n".join(lines))
        raise BuildError(lines[-1] if lines else how_ended(done.returncode))


def _keep(made: Path, kept: Path) -> Path:
    """Where the code is in the end: others may have been quicker, or the place not writable."""
    try:
        made.rename(kept)
    except OSError:
        return made
    return kept
