"""Two decoder graphs in one that is told whether it has a cache, as Optimum merges them.

The branches of an `If` share the weights, so that they are in memory once.
"""

import hashlib
from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes import common

SWITCH = "use_cache_branch"


def merge_decoders(first: ir.Model, later: ir.Model) -> ir.Model:
    """Merge the graphs of the first pass and of all others; they are used up.

    The result takes the inputs of both. Outputs that `later` lacks, those of what was read once and
    for all, are empty in its branch.
    """
    inputs = _shared_inputs(first.graph, later.graph)
    switch = ir.Value(name=SWITCH, type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([1]))
    names = [str(value.name) for value in first.graph.outputs]
    outputs = [
        ir.Value(name=value.name, type=value.type, shape=_open_shape(value))
        for value in first.graph.outputs
    ]
    found = {value.name: value for value in later.graph.outputs}
    for value in outputs:
        if (cached := found.get(value.name)) is not None:
            value.shape = _open_shape(cached)
    weights: list[ir.Value] = []
    branches = {
        "then_branch": _branch(later.graph, outputs, names, weights, "later"),
        "else_branch": _branch(first.graph, outputs, names, weights, "first"),
    }
    choice = ir.Node(
        "",
        "If",
        [switch],
        [ir.AttrGraph(name, graph) for name, graph in branches.items()],
        outputs=outputs,
    )
    graph = ir.Graph(
        [*inputs, switch],
        outputs,
        nodes=[choice],
        initializers=_distinct(weights),
        opset_imports={**first.graph.opset_imports, **later.graph.opset_imports},
        name="decoder_model_merged",
    )
    model = ir.Model(graph, ir_version=max(first.ir_version, later.ir_version))
    common.NameFixPass()(model)
    return model


def _shared_inputs(first: ir.Graph, later: ir.Graph) -> list[ir.Value]:
    """Inputs of both graphs; one of the same name is one value from here on."""
    shared = {value.name: value for value in later.inputs}
    for value in first.inputs:
        if value.name in shared:
            ir.convenience.replace_all_uses_with(value, shared[value.name])
    own = [value for value in first.inputs if value.name not in shared]
    merged = [*own, *later.inputs]
    first.inputs.clear()
    later.inputs.clear()
    return merged


def _branch(
    graph: ir.Graph,
    outputs: Sequence[ir.Value],
    names: list[str],
    weights: list[ir.Value],
    prefix: str,
) -> ir.Graph:
    """The nodes of a graph as a branch; its weights go to `weights`."""
    for value in list(graph.initializers.values()):
        graph.initializers.pop(str(value.name))
        value.name = f"{prefix}.{value.name}"
        weights.append(value)
    nodes = list(graph)
    found = {str(value.name): value for value in graph.outputs}
    graph.outputs.clear()
    graph.remove(nodes)
    results = []
    for name, output in zip(names, outputs, strict=True):
        if name in found:
            result = found[name]
        else:
            empty = _empty(output)
            nodes.append(empty)
            result = empty.outputs[0]
        results.append(result)
    for node in nodes:
        for value in node.outputs:
            value.name = f"{prefix}.{value.name}"
    return ir.Graph([], results, nodes=nodes, name=prefix)


def _distinct(weights: Sequence[ir.Value]) -> list[ir.Value]:
    """One of each content; the others' uses become uses of it."""
    kept: dict[tuple[object, ...], ir.Value] = {}
    for value in weights:
        assert value.const_value is not None
        tensor = value.const_value
        digest = hashlib.sha256(tensor.tobytes()).digest()
        same = kept.setdefault((tensor.dtype, tuple(tensor.shape), digest), value)
        if same is not value:
            ir.convenience.replace_all_uses_with(value, same)
    return list(kept.values())


def _empty(like: ir.Value) -> ir.Node:
    """A constant without elements, of the rank and type of another value."""
    assert like.shape is not None
    assert like.dtype is not None
    dims = [size if isinstance(size, int) else 0 for size in like.shape]
    tensor = ir.tensor([], dtype=like.dtype).numpy().reshape(dims)
    value = ir.Value(name=f"{like.name}.none", type=like.type, shape=ir.Shape(dims))
    attributes = [ir.AttrTensor("value", ir.Tensor(tensor))]
    return ir.Node("", "Constant", [], attributes, outputs=[value])


def _open_shape(value: ir.Value) -> ir.Shape:
    """A shape whose unknown sizes have no relation to others."""
    assert value.shape is not None
    return ir.Shape([size if isinstance(size, int) else None for size in value.shape])
