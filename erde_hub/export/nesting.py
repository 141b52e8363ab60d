"""The second step of an export: the flat graph is cut at its exits and nested, so that later layers can be skipped.

    layers up to exit 0, its logits, who leaves
    If all have left: answers so far
    else:
        layers up to exit 1, its logits, who leaves
        If all have left: answers so far
        else:
            ...

In a file for batches of one sample, the answer of a deeper exit is the answer: there is nothing to merge, and both
branches of every ``If`` have one fixed shape.

A branch sees the values outside it by name, so nothing has to be handed over. What has to move is the weights: an
initializer outside a branch is not a constant to onnxruntime's optimiser, which then neither fuses nor re-packs the
convolutions that read it, and the full path takes several times as long.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common as passes
from onnx_ir.tape import Tape

from erde_hub.errors import ExportError

from .flat import BATCH

#: Initializers that several branches read are copied into each up to this size (scales, axes, shapes); larger ones stay
#: where all can see them.
COPY_LIMIT = 64 * 1024


#: Weights above this many bytes go into a second file next to the ONNX file, whose format ends at 2 GiB.
EXTERNAL_DATA_LIMIT = 1_900_000_000


def weight_bytes(model: ir.Model) -> int:
    """Size of all initializers, those in branches included."""
    graphs = [model.graph, *model.graph.subgraphs()]
    tensors = (value.const_value for graph in graphs for value in graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def weights_of(path: Path) -> Path | None:
    """Returns the file next to an ONNX file that holds its weights; None where it has none, or not one of ours."""
    candidates = {file.name for file in path.parent.glob(f"{glob.escape(path.name)}.*data")}
    if not candidates or not path.is_file():
        return None
    try:
        model = ir.load(path, format="protobuf")
    except Exception:  # noqa: BLE001 - no ONNX file, of whatever kind
        return None
    graphs = [model.graph, *model.graph.subgraphs()]
    tensors = (value.const_value for graph in graphs for value in graph.initializers.values())
    names = {str(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    return path.with_name(min(names & candidates)) if names & candidates else None


def nest_exits(flat: ir.Model) -> ir.Model:
    """Cuts and nests, in place: outputs become ``logits, exit_index``, and ``threshold`` may hold one number too.

    Args:
        flat: See :func:`~erde_hub.export.flat.flat_model`; quantised or not.
    """
    graph = flat.graph
    outputs = list(graph.outputs)
    early = (len(outputs) - 2) // 2
    logits, leaves, poison = outputs[: early + 1], outputs[early + 1 : -1], outputs[-1]
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(flat)
    graph.sort()
    _drop_stacking(graph)
    one_sample = graph.inputs[0].shape is not None and graph.inputs[0].shape[0] == 1
    if not one_sample:
        _broadcast_threshold(graph, early)
    graph.outputs.clear()
    targets = [[logits[i], leaves[i], poison] if i < early else [logits[i]] for i in range(early + 1)]
    levels = _levels(graph, targets)
    _copy_dequantization(graph, levels)
    dead = [node for node in graph if node not in levels]
    graph.remove(dead, safe=True)
    graphs = [graph, *(ir.Graph([], [], nodes=[], name=f"until_exit_{i}") for i in range(1, early + 1))]
    nodes = list(graph)
    used = _initializer_levels(nodes, levels)
    for node in nodes:
        if levels[node] > 0:
            graph.remove(node)
            graphs[levels[node]].append(node)
    _place_initializers(graphs, levels, used)
    results = (_OneSampleNester if one_sample else _Nester)(graphs, logits, leaves, poison).run()
    graph.outputs.extend(results)
    for value in (*logits, *leaves, poison):
        value.name = f"exit.{value.name}"  # `logits` and `exit_index` are the file's, these are steps on the way
    passes.NameFixPass()(flat)
    passes.RemoveUnusedNodesPass()(flat)
    for inner in (graph, *graph.subgraphs()):
        _keep_padding(inner)  # after the pass, which takes outputs away that nobody reads
    return flat


def _drop_stacking(graph: ir.Graph) -> None:
    """Policies read the last of a stack of log-probabilities; of a stack of one that is the tensor itself."""
    for node in graph:
        if node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 0:
            continue
        stack = node.inputs[0].producer() if node.inputs[0] is not None else None
        if stack is None or stack.op_type != "Unsqueeze" or _constant(stack, 1) != [0]:
            continue
        if isinstance(_constant(node, 1), int) and stack.inputs[0] is not None:
            node.outputs[0].replace_all_uses_with(stack.inputs[0])


def _constant(node: ir.Node, position: int) -> Any:
    """The value of a constant input, as Python numbers; None where it is computed."""
    value = node.inputs[position]
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return tensor.numpy().tolist() if tensor is not None else None


def _broadcast_threshold(graph: ir.Graph, early: int) -> None:
    """Lets ``threshold`` have length 1 too; any other length fails in a node whose name says what is allowed."""
    if early == 1:
        return
    fixed = graph.inputs[-1]
    given = ir.Value(name="threshold", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["thresholds"]))
    fixed.name = "thresholds"
    tape = Tape()
    shape = tape.initializer(ir.tensor([early], dtype=ir.DataType.INT64, name="num_early_exits"))
    expanded = tape.op("Expand", [given, shape], name=f"threshold_must_hold_1_number_or_{early}")
    expanded.name, expanded.type, expanded.shape = "thresholds", given.type, ir.Shape([early])
    fixed.replace_all_uses_with(expanded)
    graph.inputs[-1] = given
    graph.register_initializer(shape)
    graph.insert_before(graph[0], tape.nodes)


def _keep_padding(graph: ir.Graph) -> None:
    """Keeps onnxruntime from fusing zeros that were padded into the max-pooling behind them, which pads with -infinity.

    Where all that is under the window is negative, as in BiT, whose stem has no activation, its answer would be wrong.
    It leaves a pooling alone that also returns indices; see https://github.com/microsoft/onnxruntime/pull/18136.
    """
    for node in graph:
        padded = node.inputs[0].producer() if node.op_type == "MaxPool" and node.inputs[0] is not None else None
        if padded is not None and padded.op_type == "Pad" and len(node.outputs) == 1:
            node.resize_outputs(2)
            found = node.outputs[1]
            found.name, found.type = f"{node.outputs[0].name}_indices", ir.TensorType(ir.DataType.INT64)


def _read_values(node: ir.Node) -> Iterator[ir.Value]:
    """Values that a node reads, those read inside its own subgraphs included."""
    for inner in (node, *_inner_nodes(node)):
        yield from (value for value in inner.inputs if value is not None)


def _inner_nodes(node: ir.Node) -> Iterator[ir.Node]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield from ir.traversal.RecursiveGraphIterator(attribute.as_graph())


def _levels(graph: ir.Graph, targets: Sequence[Sequence[ir.Value]]) -> dict[ir.Node, int]:
    """Finds for every node the first exit that needs it."""
    levels: dict[ir.Node, int] = {}
    for level, values in enumerate(targets):
        stack = [value.producer() for value in values]
        while stack:
            node = stack.pop()
            if node is None or node in levels or node.graph is not graph:
                continue
            levels[node] = level
            stack.extend(value.producer() for value in _read_values(node))
    return levels


def _copy_dequantization(graph: ir.Graph, levels: dict[ir.Node, int]) -> None:
    """Gives every level its own DequantizeLinear: onnxruntime fuses it only with layers of the same graph."""
    for node in [n for n in graph if n.op_type == "DequantizeLinear" and n in levels]:
        (output,) = node.outputs
        copies: dict[int, ir.Value] = {levels[node]: output}
        for user, position in output.uses():
            level = levels.get(user)
            if level is None:
                continue
            if level not in copies:
                tape = Tape()
                copy = tape.op(node.op_type, node.inputs, dict(node.attributes), name=f"{node.name}_{level}")
                copy.name, copy.type, copy.shape = f"{output.name}_{level}", output.type, output.shape
                graph.insert_after(node, tape.nodes)
                levels[tape.nodes[0]] = level
                copies[level] = copy
            user.replace_input_with(position, copies[level])
        if not output.uses():
            graph.remove(node, safe=True)
            del levels[node]


def _initializer_levels(nodes: Sequence[ir.Node], levels: dict[ir.Node, int]) -> dict[str, set[int]]:
    used: dict[str, set[int]] = {}
    for node in nodes:
        for value in _read_values(node):
            if value.is_initializer() and value.name:
                used.setdefault(value.name, set()).add(levels[node])
    return used


def _place_initializers(graphs: Sequence[ir.Graph], levels: dict[ir.Node, int], used: dict[str, set[int]]) -> None:
    """Moves every initializer into the branch that reads it, and copies small ones that several read."""
    main = graphs[0]
    for name, value in list(main.initializers.items()):
        if name not in used:
            del main.initializers[name]
            continue
        first, *others = sorted(used[name])
        small = _array(value).nbytes <= COPY_LIMIT
        if first > 0 and (small or not others):
            del main.initializers[name]
            graphs[first].register_initializer(value)
        for level in others if small else ():
            # A tensor of its own: one that two values share would be renamed with either.
            own = ir.tensor(_array(value), name=f"{name}.{level}")
            copy = ir.Value(name=own.name, type=value.type, shape=value.shape, const_value=own)
            graphs[level].register_initializer(copy)
            for node in graphs[level]:
                for inner in (node, *_inner_nodes(node)):
                    for position, read in enumerate(inner.inputs):
                        if read is value:
                            inner.replace_input_with(position, copy)


def _array(value: ir.Value) -> NDArray[Any]:
    if value.const_value is None:
        raise ExportError(f"initializer {value.name!r} has no value: the exporter did not keep the weights")
    return value.const_value.numpy()


class _Nester:
    """Appends to each graph the decision who has left, and the branch behind it.

    Every operator costs a few microseconds whatever it computes, so there are as few as possible.
    """

    batch: str | int = BATCH

    def __init__(
        self, graphs: Sequence[ir.Graph], logits: Sequence[ir.Value], leaves: Sequence[ir.Value], poison: ir.Value
    ) -> None:
        self.graphs = graphs
        self.logits = logits
        self.leaves = leaves
        self.poison = poison
        self.opset = graphs[0].opset_imports[""]
        shape = logits[0].shape
        self.types = (logits[0].type, ir.TensorType(ir.DataType.INT64))
        classes = shape[1:] if shape is not None else [None]
        self.shapes = (ir.Shape([self.batch, *classes]), ir.Shape([self.batch]))

    def run(self) -> list[ir.Value]:
        """Returns the outputs of the main graph."""
        return self._end(Tape(self.graphs[0]), 0, self.leaves[0], self.logits[0], None)

    def _end(self, tape: Tape, level: int, left: ir.Value, answer: ir.Value, waited: ir.Value | None) -> list[ir.Value]:
        """Ends the graph of a level with the decision to go on; returns logits and exit index.

        Args:
            tape: Writes to the graph of this level.
            level: Index of the exit just computed.
            left: (N,) bool, who has left, here or earlier.
            answer: (N, K), valid for those who have left.
            waited: (N,) int64, how many exits ago each sample had left; None at the first.
        """
        outputs = self._outputs("" if level == 0 else f"exit_{level}.")
        tape.op_multi_out(
            "If",
            [self._all(tape, left, f"exit_{level}.all_have_left")],
            {
                "then_branch": self._stop(level, answer, waited),
                "else_branch": self._go_on(level + 1, left, answer, waited),
            },
            outputs=outputs,
            name=f"exit_{level}.if_all_have_left",
        )
        return outputs

    def _stop(self, level: int, answer: ir.Value, waited: ir.Value | None) -> ir.Graph:
        graph = ir.Graph([], [], nodes=[], name=f"leave_at_exit_{level}")
        tape = Tape(graph)
        logits, exit_index = self._outputs(f"exit_{level}.leave.")
        tape.op("Identity", [answer], output=logits, name=f"exit_{level}.leave.answer")
        if waited is None:  # zeros: whoever is NaN does not leave
            tape.op("Cast", [self.poison], {"to": ir.DataType.INT64}, output=exit_index, name="exit_0.leave.index")
        else:
            own = _number(tape, level, f"exit_{level}.leave.number")
            tape.op("Sub", [own, waited], output=exit_index, name=f"exit_{level}.leave.index")
        graph.outputs.extend([logits, exit_index])
        return graph

    def _go_on(self, level: int, left: ir.Value, answer: ir.Value, waited: ir.Value | None) -> ir.Graph:
        graph = self.graphs[level]
        tape = Tape(graph)
        prefix = f"exit_{level}"
        last = level == len(self.leaves)
        logits = self.logits[level]
        axis = tape.initializer(ir.tensor(np.array([1], np.int64), name=f"{prefix}.axis"))
        if last:
            poison = tape.op("Unsqueeze", [self.poison, axis], name=f"{prefix}.poison")
            logits = tape.op("Add", [logits, poison], name=f"{prefix}.valid_logits")
        column = tape.op("Unsqueeze", [left, axis], name=f"{prefix}.left_before")
        merged, index = self._outputs(f"{prefix}.answer.")
        tape.op("Where", [column, answer, logits], output=merged, name=f"{prefix}.answer")
        gone = tape.op("Cast", [left], {"to": ir.DataType.INT64}, name=f"{prefix}.gone")
        waited = gone if waited is None else tape.op("Add", [waited, gone], name=f"{prefix}.waited")
        if last:
            tape.op("Sub", [_number(tape, level, f"{prefix}.number"), waited], output=index, name=f"{prefix}.index")
            graph.outputs.extend([merged, index])
            return graph
        left_now = tape.op("Or", [left, self.leaves[level]], name=f"{prefix}.left")
        graph.outputs.extend(self._end(tape, level, left_now, merged, waited))
        return graph

    def _outputs(self, prefix: str) -> list[ir.Value]:
        names = (f"{prefix}logits", f"{prefix}exit_index")
        return [
            ir.Value(name=name, type=kind, shape=shape.copy())
            for name, kind, shape in zip(names, self.types, self.shapes, strict=True)
        ]

    def _all(self, tape: Tape, mask: ir.Value, name: str) -> ir.Value:
        if self.opset >= 20:  # ReduceMin takes booleans
            return tape.op("ReduceMin", [mask], {"keepdims": 0}, name=name)
        numbers = tape.op("Cast", [mask], {"to": ir.DataType.INT32}, name=f"{name}.numbers")
        smallest = tape.op("ReduceMin", [numbers], {"keepdims": 0}, name=f"{name}.smallest")
        return tape.op("Cast", [smallest], {"to": ir.DataType.BOOL}, name=name)


class _OneSampleNester(_Nester):
    """The same for a batch of one, which has left as a whole or not at all."""

    batch = 1

    def _stop(self, level: int, answer: ir.Value, waited: ir.Value | None) -> ir.Graph:
        graph = ir.Graph([], [], nodes=[], name=f"leave_at_exit_{level}")
        tape = Tape(graph)
        logits, exit_index = self._outputs(f"exit_{level}.leave.")
        tape.op("Identity", [answer], output=logits, name=f"exit_{level}.leave.answer")
        self._index(tape, level, exit_index, f"exit_{level}.leave")
        graph.outputs.extend([logits, exit_index])
        return graph

    def _go_on(self, level: int, left: ir.Value, answer: ir.Value, waited: ir.Value | None) -> ir.Graph:
        graph = self.graphs[level]
        tape = Tape(graph)
        if level < len(self.leaves):
            graph.outputs.extend(self._end(tape, level, self.leaves[level], self.logits[level], None))
            return graph
        logits, exit_index = self._outputs(f"exit_{level}.answer.")
        tape.op("Add", [self.logits[level], self.poison], output=logits, name=f"exit_{level}.valid_logits")
        self._index(tape, level, exit_index, f"exit_{level}")
        graph.outputs.extend([logits, exit_index])
        return graph

    def _index(self, tape: Tape, level: int, output: ir.Value, prefix: str) -> None:
        number = tape.initializer(ir.tensor(np.array([level], np.int64), name=f"{prefix}.number"))
        tape.op("Identity", [number], output=output, name=f"{prefix}.index")

    def _all(self, tape: Tape, mask: ir.Value, name: str) -> ir.Value:
        return tape.op("Squeeze", [mask], name=name)


def _number(tape: Tape, value: int, name: str) -> ir.Value:
    return tape.initializer(ir.tensor(np.array(value, np.int64), name=name))
