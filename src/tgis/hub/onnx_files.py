"""Which of a model's `.onnx` files are its graphs: Optimum's names, and where the Hub keeps them.

The files lie beside config.json, or in `onnx/` below it. A decoder is one graph (`model.onnx`, or a
merged one that is told whether it has a cache), or two: one for the first pass and one for all
others. An encoder is a graph of its own. Of each there may be variants in other types, such as
`model_fp16.onnx` and `model_quantized.onnx`: the plain one is served, else the only one.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tgis.errors import ModelError
from tgis.types import ModelKind

SINGLE = "model.onnx"
ENCODER = "encoder_model.onnx"
FIRST = "decoder_model.onnx"
LATER = "decoder_with_past_model.onnx"
MERGED = "decoder_model_merged.onnx"
# Encoder, first pass, all others; the preferred ones first.
_LAYOUTS: dict[ModelKind, tuple[tuple[str | None, str, str], ...]] = {
    ModelKind.DECODER_ONLY: (
        (None, SINGLE, SINGLE),
        (None, MERGED, MERGED),
        (None, FIRST, LATER),
    ),
    ModelKind.ENCODER_DECODER: ((ENCODER, MERGED, MERGED), (ENCODER, FIRST, LATER)),
}
_FOLDERS = ("", "onnx/")
_SUFFIX = ".onnx"
_DATA = ("_data*", ".data")  # after a graph's name: weights that are too large for it


class GraphFiles(NamedTuple):
    """Paths below the model's directory; `first` and `later` may be the same."""

    encoder: str | None
    first: str
    later: str

    @property
    def names(self) -> list[str]:
        """Each once."""
        return [name for name in dict.fromkeys(self) if name is not None]


def find_graphs(directory: Path, kind: ModelKind) -> GraphFiles | None:
    """The graphs to serve; None if there are no `.onnx` files at all.

    Raises:
        ModelError: they make up no layout, or several variants and no plain one.
    """
    there = _graphs_in(directory)
    if not there:
        return None
    variants = ["", *sorted(set(_variants(there)))]
    found = {
        variant: graphs
        for variant in variants
        if (graphs := _complete(there, kind, variant)) is not None
    }
    if not found:
        raise ModelError(
            f"expected {expected(kind)} in {directory} or its onnx/, but there are only"
            f" {', '.join(sorted(there))}"
        )
    if "" in found or len(found) == 1:
        return next(iter(found.values()))
    names = ", ".join(name for graphs in found.values() for name in graphs.names)
    raise ModelError(
        f"several variants of its ONNX files are in {directory} ({names}), and none without a"
        " suffix; leave one of them there"
    )


def with_weights(directory: Path, graphs: GraphFiles) -> list[str]:
    """The graphs, and the files beside them that hold their weights."""
    beside = (directory.glob(name + end) for name in graphs.names for end in _DATA)
    data = {str(path.relative_to(directory)) for paths in beside for path in paths}
    return sorted({*graphs.names, *data})


def expected(kind: ModelKind) -> str:
    """What there should be, for a message."""
    layouts = (GraphFiles(*layout).names for layout in _LAYOUTS[kind])
    return " or ".join(" and ".join(names) for names in layouts)


def _graphs_in(directory: Path) -> set[str]:
    """Every `.onnx` file, as a path below the directory."""
    found = (directory.glob(f"{folder}*{_SUFFIX}") for folder in _FOLDERS)
    return {str(path.relative_to(directory)) for paths in found for path in paths}


def _complete(there: set[str], kind: ModelKind, variant: str) -> GraphFiles | None:
    """The first layout of which all files are there."""
    for folder in _FOLDERS:
        for layout in _LAYOUTS[kind]:
            encoder, first, later = layout
            graphs = GraphFiles(
                encoder and _named(folder, encoder, variant),
                _named(folder, first, variant),
                _named(folder, later, variant),
            )
            if there >= set(graphs.names):
                return graphs
    return None


def _named(folder: str, name: str, variant: str) -> str:
    return folder + name.removesuffix(_SUFFIX) + variant + _SUFFIX


def _variants(there: Iterable[str]) -> Iterable[str]:
    """What may stand between a graph's name and its suffix."""
    stems = [name.removesuffix(_SUFFIX) for name in (SINGLE, ENCODER, FIRST, LATER, MERGED)]
    for path in there:
        name = path.rpartition("/")[2].removesuffix(_SUFFIX)
        yield from (name.removeprefix(stem) for stem in stems if name.startswith(f"{stem}_"))
