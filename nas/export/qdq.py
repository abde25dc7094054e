"""ONNX graphs of int8 networks with their weights as int8 and their biases as int32, as engines take them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx


def with_integer_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a QDQ graph that stores what it quantises of itself: int8 weights and int32 biases.

    An exporter leaves weights in floating point with a QuantizeLinear behind each, and biases as they are. The graph
    computes the same; its file takes a quarter of the space, and engines need not find out for themselves. A bias is
    stored where the node adds it to a product of integers, in steps of input times weight (per output channel).
    """
    import onnx
    from onnx import helper, numpy_helper

    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and len(node.attribute) == 1 and node.attribute[0].name == "value":
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)

    def store(name: str, values: np.ndarray) -> None:
        constants[name] = values
        graph.initializer.append(numpy_helper.from_array(values, name))

    nodes = []
    for node in graph.node:
        if node.op_type == "QuantizeLinear" and all(name in constants for name in node.input):
            values, scale, zero_point = (constants[name] for name in node.input)
            axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
            shape = [-1 if i == axis % values.ndim else 1 for i in range(values.ndim)] if scale.ndim else []
            kind = np.iinfo(zero_point.dtype)
            steps = np.rint(values / scale.reshape(shape)) + zero_point.astype(np.float32).reshape(shape)
            store(node.output[0], steps.clip(kind.min, kind.max).astype(zero_point.dtype))
        else:
            nodes.append(node)

    makers = {node.output[0]: node for node in nodes if node.op_type == "DequantizeLinear"}
    complete: list[onnx.NodeProto] = []
    for node in nodes:
        if node.op_type == "Transpose" and node.input[0] in makers and makers[node.input[0]].input[0] in constants:
            # Of a weight, for a matrix product: the integers are turned, so that they still stand right before it.
            before, order = makers[node.input[0]], [*node.attribute[0].ints]
            axis = next((attribute.i for attribute in before.attribute if attribute.name == "axis"), 1)
            store(f"{node.output[0]}_integers", np.ascontiguousarray(constants[before.input[0]].transpose(order)))
            names = [f"{node.output[0]}_integers", *before.input[1:]]
            node = helper.make_node("DequantizeLinear", names, [node.output[0]], axis=order.index(axis))
            makers[node.output[0]] = node
        if node.op_type in ("Conv", "Gemm") and len(node.input) == 3 and node.input[2] in constants:
            taken, weight = (makers.get(name) for name in node.input[:2])
            if taken is not None and weight is not None:
                step = (constants[taken.input[1]] * constants[weight.input[1]]).reshape(-1).astype(np.float32)
                bias = constants[node.input[2]]
                base = node.output[0]
                most = np.iinfo(np.int32).max
                store(f"{base}_bias", np.rint(bias / step).clip(-most, most).astype(np.int32))
                store(f"{base}_bias_step", step if len(step) == len(bias) else np.full(len(bias), step[0], np.float32))
                store(f"{base}_bias_zero", np.zeros(len(bias), np.int32))
                names = [f"{base}_bias", f"{base}_bias_step", f"{base}_bias_zero"]
                complete.append(helper.make_node("DequantizeLinear", names, [f"{base}_bias_float"], axis=0))
                node.input[2] = f"{base}_bias_float"
        complete.append(node)
    del graph.node[:]
    graph.node.extend(complete)
    read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return result
