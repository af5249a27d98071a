"""The two ONNX graphs of a model: the listener, and one step of the speller.

The graphs are written node by node, not traced: batch size, lengths and beam are free, and padding is masked as in
las_fast.model. The listener takes feature frames before normalisation and deltas, as Recogniser.decode does.

    listener: frames (B, T, F) float32, frame_counts (B,) int64, each from 1 to T
              -> keys (B, S, D), values (B, S, E), lengths (B,) int64: S encoder frames;
                 with a CTC head also ctc_logits (B, C, V), ctc_lengths (B,) int64: C CTC frames
    speller:  tokens (B, K) int64, keys, values, lengths, hidden0 (B, K, H), cell0 (B, K, H), hidden1, cell1, ...,
              context (B, K, E)
              -> logits (B, K, V), attended (B, K) int64 encoder frames, next_hidden0, next_cell0, ..., next_context

The initial state is zero. Metadata "las_fast" is JSON; see `description`.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from las_fast import __version__
from las_fast.checkpoint import Loaded
from las_fast.model.listener import BiLSTM, ConvFrontEnd
from las_fast.model.speller import LSTMCell
from las_fast.ops.masked_attention import LOWEST
from las_fast.text import EOS, PAD, SOS

OPSET, IR_VERSION = 20, 9  # 20 is the first with Gelu; onnxruntime 1.17 and later read both
PRODUCER = "las_fast"
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


class Graph:
    """A graph under construction. Its methods add nodes and return the names of their outputs."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, dtype: int, *shape: str | int) -> str:
        """Add an input of the model; text in the shape names a free dimension."""
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, value: str, name: str, dtype: int, *shape: str | int) -> None:
        """Make a value an output of the model."""
        self.nodes.append(helper.make_node("Identity", [value], [name]))
        self.outputs.append(helper.make_tensor_value_info(name, dtype, shape))

    def constant(self, value: Any, dtype: Any = None) -> str:
        """Add a constant: a tensor, or numbers of a numpy dtype."""
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value, dtype)
        name = f"constant{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def node(self, count: int, op: str, *inputs: str, **attributes: Any) -> list[str]:
        """Add a node with `count` outputs and return their names."""
        names = [f"value{len(self.nodes)}_{i}" for i in range(count)]
        self.nodes.append(helper.make_node(op, inputs, names, **attributes))
        return names

    def __call__(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output and return its name."""
        return self.node(1, op, *inputs, **attributes)[0]

    def floats(self, number: float) -> str:
        return self.constant(number, np.float32)

    def ints(self, *numbers: int) -> str:
        return self.constant(numbers, np.int64)

    def linear(self, x: str, weight: Tensor, bias: Tensor | None = None) -> str:
        product = self("MatMul", x, self.constant(weight.detach().T))
        return product if bias is None else self("Add", product, self.constant(bias))

    def layer_norm(self, x: str, norm: nn.Module) -> str:
        assert isinstance(norm, nn.LayerNorm)
        weights = self.constant(norm.weight), self.constant(norm.bias)
        return self("LayerNormalization", x, *weights, axis=-1, epsilon=norm.eps)

    def size(self, x: str, axis: int) -> str:
        """Return the length of an axis, (1,) int64."""
        return self("Shape", x, start=axis, end=axis + 1)

    def valid(self, lengths: str, size: str) -> str:
        """Return a mask (B, size) bool, False at padding, from lengths (B,) and a size (1,)."""
        zero, one = self.constant(0, np.int64), self.constant(1, np.int64)
        positions = self("Range", zero, self("Squeeze", size), one)
        return self("Less", positions, self("Unsqueeze", lengths, self.ints(1)))

    def zero_padding(self, x: str, lengths: str) -> str:
        """Set x (B, T, F) to 0 past the lengths (B,)."""
        valid = self("Unsqueeze", self.valid(lengths, self.size(x, 1)), self.ints(2))
        return self("Where", valid, x, self.floats(0))

    def model(self, name: str, metadata: str) -> onnx.ModelProto:
        """Return the checked model, with metadata "las_fast"."""
        graph = helper.make_graph(self.nodes, name, self.inputs, self.outputs, self.initializers)
        model = helper.make_model(
            graph, producer_name=PRODUCER, producer_version=__version__, ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid("", OPSET)],
        )  # fmt: skip
        helper.set_model_props(model, {PRODUCER: metadata})
        onnx.checker.check_model(model, full_check=True)
        return model


def onnx_models(loaded: Loaded) -> dict[str, bytes]:
    """Return the serialised ONNX models {"listener": ..., "speller": ...} of a checkpoint, in float32."""
    metadata = json.dumps(description(loaded))
    graphs = {"listener": listener_graph(loaded), "speller": speller_graph(loaded)}
    return {name: graph.model(name, metadata).SerializeToString() for name, graph in graphs.items()}


def description(loaded: Loaded) -> dict[str, Any]:
    """Return the settings that a program needs to run the graphs, as a JSON object.

    Token t >= 3 is characters[t - 3]; tokens 0, 1 and 2 are pad, sos and eos. The text of n encoder frames has at most
    int(float32(n * time_reduction) * float32(maximum_share)) + maximum_extra tokens, and at least 1 is allowed.
    """
    config = loaded.config
    return {
        "characters": config.data.characters,
        "pad": PAD,
        "sos": SOS,
        "eos": EOS,
        "time_reduction": loaded.model.time_reduction,
        "maximum_share": config.decoding.maximum_share,
        "maximum_extra": config.decoding.maximum_extra,
        "features": dataclasses.asdict(config.features),
    }


# ------------------------------------------------------------------------------------------------------------ Listener


def listener_graph(loaded: Loaded) -> Graph:
    """Return the graph of normalisation, deltas and LAS.listen."""
    g, model, size = Graph(), loaded.model, loaded.config.features.size
    frames = g.input("frames", FLOAT, "B", "T", size)
    lengths = g.input("frame_counts", INT64, "B")
    x = _deltas(g, _normalised(g, frames, lengths, loaded), lengths, loaded.config.features.deltas)
    x, lengths = _front_end(g, model.listener.front, g.zero_padding(x, lengths), lengths)
    ctc_input = None
    for i, (layer, norm) in enumerate(zip(model.listener.layers, model.listener.norms, strict=True)):
        if 1 <= i <= model.listener.pyramids:
            x, lengths = _halve_time(g, x, lengths)
        assert isinstance(layer, BiLSTM)
        x = g.zero_padding(g.layer_norm(_bilstm(g, layer, x, lengths), norm), lengths)
        if i == model.ctc_layer:
            ctc_input = x, lengths
    attention = model.speller.attention
    g.output(g.linear(x, attention.key.weight), "keys", FLOAT, "B", "S", attention.key.out_features)
    values = g.linear(x, attention.value.weight, attention.value.bias)
    g.output(values, "values", FLOAT, "B", "S", attention.value.out_features)
    g.output(lengths, "lengths", INT64, "B")
    if ctc_input is not None and model.ctc is not None:
        logits = g.linear(ctc_input[0], model.ctc.weight, model.ctc.bias)
        g.output(logits, "ctc_logits", FLOAT, "B", "C", model.vocabulary_size)
        g.output(ctc_input[1], "ctc_lengths", INT64, "B")
    return g


def _normalised(g: Graph, x: str, lengths: str, loaded: Loaded) -> str:
    """Normalise frames (B, T, F) as las_fast.data.normalisation.normalise does; sums are in float64."""
    kind = loaded.config.features.normalisation
    if kind == "none":
        return x
    if kind == "global":
        assert loaded.statistics is not None
        mean, std = g.constant(loaded.statistics.mean.float()), g.constant(loaded.statistics.std.float())
        return g("Div", g("Sub", x, mean), std)
    count = g("Cast", g("Unsqueeze", lengths, g.ints(1, 2)), to=TensorProto.DOUBLE)

    def mean_of(value: str) -> str:
        total = g("ReduceSum", g("Cast", value, to=TensorProto.DOUBLE), g.ints(1), keepdims=1)
        return g("Cast", g("Div", total, count), to=FLOAT)

    mean = mean_of(g.zero_padding(x, lengths))
    centred = g.zero_padding(g("Sub", x, mean), lengths)
    std = g("Sqrt", mean_of(g("Mul", centred, centred)))
    min_std = g("Mul", g.floats(1e-6), g("Add", g.floats(1), g("Abs", mean)))
    return g("Div", centred, g("Where", g("Greater", std, min_std), std, g.floats(np.inf)))


def _deltas(g: Graph, x: str, lengths: str, order: int) -> str:
    """Append deltas as las_fast.data.features.add_deltas does: the edge frames of each utterance are repeated."""
    if not order:
        return x
    zero, one = g.constant(0, np.int64), g.constant(1, np.int64)
    positions = g("Range", zero, g("Squeeze", g.size(x, 1)), one)
    last = g("Sub", g("Unsqueeze", lengths, g.ints(1)), g.ints(1))  # (B, 1)

    def shifted(block: str, offset: int) -> str:
        index = g("Min", g("Max", g("Add", positions, g.ints(offset)), g.ints(0)), last)
        return g("GatherND", block, g("Unsqueeze", index, g.ints(2)), batch_dims=1)

    blocks = [x]
    for _ in range(order):
        near, far = (g("Sub", shifted(blocks[-1], n), shifted(blocks[-1], -n)) for n in (1, 2))
        blocks.append(g("Div", g("Add", near, g("Mul", g.floats(2), far)), g.floats(10)))
    return g("Concat", *blocks, axis=2)


def _front_end(g: Graph, front: ConvFrontEnd, x: str, lengths: str) -> tuple[str, str]:
    for conv, norm in zip(front.convs, front.norms, strict=True):
        (kernel,), (stride,) = conv.kernel_size, conv.stride
        assert conv.bias is not None
        weights = g.constant(conv.weight), g.constant(conv.bias)
        pads = [kernel // 2] * 2
        y = g("Conv", g("Transpose", x, perm=[0, 2, 1]), *weights, strides=[stride], pads=pads, kernel_shape=[kernel])
        x = g("Gelu", g.layer_norm(g("Transpose", y, perm=[0, 2, 1]), norm))
        lengths = g("Add", g("Div", g("Sub", lengths, g.ints(1)), g.ints(stride)), g.ints(1))
        x = g.zero_padding(x, lengths)
    return x, lengths


def _halve_time(g: Graph, x: str, lengths: str) -> tuple[str, str]:
    """Concatenate pairs of frames as las_fast.model.listener.halve_time does."""
    odd = g("Mod", g.size(x, 1), g.ints(2))
    x = g("Pad", x, g("Concat", g.ints(0, 0, 0, 0), odd, g.ints(0), axis=0))
    pairs = g("Concat", g.ints(0, -1), g("Mul", g.size(x, 2), g.ints(2)), axis=0)
    return g("Reshape", x, pairs), g("Div", g("Add", lengths, g.ints(1)), g.ints(2))


def _bilstm(g: Graph, layer: BiLSTM, x: str, lengths: str) -> str:
    """Run one bidirectional layer (B, T, I) -> (B, T, 2H). ONNX orders the gates input, output, forget, cell."""

    def gates(index: int, order: str = "ifgo", wanted: str = "iofg") -> np.ndarray:
        directions = [weights[index].detach().cpu().numpy() for weights in layer.lstm.all_weights]
        parts = [dict(zip(order, np.split(w, 4), strict=True)) for w in directions]
        return np.stack([np.concatenate([part[gate] for gate in wanted]) for part in parts])

    weight_ih, weight_hh, bias_ih, bias_hh = map(gates, range(4))
    y = g(
        "LSTM", g("Transpose", x, perm=[1, 0, 2]), g.constant(weight_ih), g.constant(weight_hh),
        g.constant(np.concatenate((bias_ih, bias_hh), 1)), g("Cast", lengths, to=TensorProto.INT32),
        hidden_size=layer.lstm.hidden_size, direction="bidirectional",
    )  # (T, 2, B, H)  # fmt: skip
    return g("Reshape", g("Transpose", y, perm=[2, 0, 1, 3]), g.ints(0, 0, 2 * layer.lstm.hidden_size))


# ------------------------------------------------------------------------------------------------------------- Speller


def speller_graph(loaded: Loaded) -> Graph:
    """Return the graph of LAS.step."""
    g, speller = Graph(), loaded.model.speller
    attention = speller.attention
    tokens = g.input("tokens", INT64, "B", "K")
    keys = g.input("keys", FLOAT, "B", "S", attention.key.out_features)
    values = g.input("values", FLOAT, "B", "S", attention.value.out_features)
    lengths = g.input("lengths", INT64, "B")
    states = [
        [g.input(f"{kind}{i}", FLOAT, "B", "K", cell.size) for kind in ("hidden", "cell")]
        for i, cell in enumerate(speller.cells)
    ]
    context = g.input("context", FLOAT, "B", "K", attention.value.out_features)

    inputs = [g("Gather", g.constant(speller.embedding.weight), tokens), context]
    for layer, state in zip(speller.cells, states, strict=True):
        state[:] = _lstm_cell(g, layer, inputs, *state)
        inputs = [state[0]]
    query = g.linear(inputs[0], attention.query.weight, attention.query.bias)
    context, attended = _attention(g, query, keys, values, lengths, attention.key.out_features**-0.5)
    joined = g("Concat", inputs[0], context, axis=-1)
    hidden = g("Gelu", g.linear(joined, speller.project.weight, speller.project.bias))
    logits = g.linear(hidden, speller.embedding.weight, speller.bias + speller.forbidden)

    g.output(logits, "logits", FLOAT, "B", "K", loaded.model.vocabulary_size)
    g.output(attended, "attended", INT64, "B", "K")
    for i, (layer, state) in enumerate(zip(speller.cells, states, strict=True)):
        for kind, value in zip(("hidden", "cell"), state, strict=True):
            g.output(value, f"next_{kind}{i}", FLOAT, "B", "K", layer.size)
    g.output(context, "next_context", FLOAT, "B", "K", attention.value.out_features)
    return g


def _lstm_cell(g: Graph, layer: LSTMCell, inputs: list[str], hidden: str, cell: str) -> list[str]:
    gates = g.linear(g("Concat", *inputs, hidden, axis=-1), layer.gates.weight, layer.gates.bias)
    i, f, c, o = g.node(4, "Split", gates, axis=-1, num_outputs=4)
    kept, added = g("Mul", g("Sigmoid", f), cell), g("Mul", g("Sigmoid", i), g("Tanh", c))
    cell = g("Add", kept, added)
    return [g("Mul", g("Sigmoid", o), g("Tanh", cell)), cell]


def _attention(g: Graph, query: str, keys: str, values: str, lengths: str, scale: float) -> tuple[str, str]:
    """Return the context (B, K, E) and the attended frames (B, K); see las_fast.ops.masked_attention."""
    valid = g("Unsqueeze", g.valid(lengths, g.size(keys, 1)), g.ints(1))  # (B, 1, S)
    scores = g("MatMul", g("Mul", query, g.floats(scale)), g("Transpose", keys, perm=[0, 2, 1]))
    weights = g("Softmax", g("Where", valid, scores, g.floats(LOWEST)), axis=-1)
    weights = g("Where", valid, weights, g.floats(0))
    return g("MatMul", weights, values), g("ArgMax", weights, axis=-1, keepdims=0)
