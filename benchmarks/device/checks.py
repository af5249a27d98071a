"""Compare the training and search paths that tests/gpu_proof cannot prove with the same computation on the CPU."""

from __future__ import annotations

import copy
import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from benchmarks.device import edit_distance
from benchmarks.device.parts import Options
from benchmarks.device.record import Record
from benchmarks.device.timing import backends_for, exact_float32
from benchmarks.training_paths import make_trainers, shape_of, shrunk, synthetic_batch, with_training, without_dropout
from las_fast import ops
from las_fast.checkpoint import build_model, load_model
from las_fast.config import Config, load_config
from las_fast.data.batch import Batch
from las_fast.model.layers import dropout_mask
from las_fast.model.listener import BiLSTM
from las_fast.model.speller import Speller
from las_fast.ops import table_model
from las_fast.search.beam import TokenHypothesis, beam_search, fold_length_reward
from las_fast.text import EOS, SOS
from las_fast.training.validate import Validation, validate

MODEL = "an4"  # the released model of the searches and of the validation
FLOAT32, BFLOAT16 = "float32", "bfloat16"
SCALE = 256.0  # of the loss in a step in bfloat16
BF16_TEXTS, BF16_SCORES = 2, 0.1  # tolerances of a search in bfloat16: texts that differ, and scores


class Comparison(NamedTuple):
    """An error and its tolerance."""

    what: str
    error: float
    tolerance: float
    shape: str = ""
    dtype: str = FLOAT32
    note: str = ""
    path: str = ""


def run(options: Options, record: Record) -> None:
    edit_distance.provide()
    for name in record.while_time_remains(list(CHECKS), "checks"):
        with record.attempt(name), exact_float32():
            for comparison in CHECKS[name](options.device, options.quick):
                what, error, tolerance, *_ = comparison
                labels = {name: getattr(comparison, name) for name in ("shape", "dtype", "note", "path")}
                record.check(what, error, tolerance, **labels)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return ||actual - expected|| / ||expected||; 0 if both are 0, infinite if only expected is."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    difference, size = float((actual - expected).norm()), float(expected.norm())
    return difference / size if size else (math.inf if difference else 0.0)


# ------------------------------------------------------------------------------------------------------- training step


def training_step(preset: str, device: str, quick: bool) -> Iterator[Comparison]:
    """One step with all losses: the device in float32 against the CPU, and in bfloat16 against float32."""
    config = with_training(without_dropout(load_config(preset)), guided_frames=6.0, clip_norm=1e9)
    config = shrunk(config) if quick else config
    lengths = torch.tensor([70, 41] if quick else [400, 397, 380, 333, 300, 256, 201, 90])
    batch = synthetic_batch(lengths, config.features.input_size)
    shape = f"{preset} {shape_of(batch)}"
    expected, expected_gradients = loss_and_gradients("las_fast", config, batch, "cpu")
    loss, gradients = loss_and_gradients("las_fast", config, batch, device)
    worst, name = worst_gradient(gradients, expected_gradients)
    yield Comparison("training step: loss", relative_error(loss, expected), 1e-4, shape)
    yield Comparison("training step: gradients", worst, 1e-3, shape, note=f"worst: {name}")
    loss, bf16_gradients = loss_and_gradients("las_fast bf16", config, batch, device)
    worst, name = worst_gradient(bf16_gradients, gradients)
    total = relative_error(torch.cat([*bf16_gradients.values()]), torch.cat([*gradients.values()]))
    yield Comparison("training step: loss", relative_error(loss, expected), 1e-2, shape, BFLOAT16)
    yield Comparison("training step: gradients", total, 1e-1, shape, BFLOAT16, f"worst: {name}, {worst:.2g}")


def loss_and_gradients(path: str, config: Config, batch: Batch, device: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of a step, and the flat gradient of each parameter on the CPU."""
    trainer = make_trainers(config, [path], device)[path]
    # At the initial scale, gradients of an untrained model overflow float16, in which cuDNN keeps those of LSTMs.
    trainer.scaler = torch.amp.GradScaler(device, init_scale=SCALE, enabled=trainer.scaler.is_enabled())
    loss = trainer.train_step(batch.to(device))["loss"]
    named = trainer.model.named_parameters()
    return loss, {name: parameter.grad.float().cpu().flatten() for name, parameter in named}


def worst_gradient(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest relative error of a parameter's gradient, and the parameter's name.

    An error is relative to the norm of the parameter's gradient plus a thousandth of the norm of all gradients, so that
    a gradient that consists of rounding errors does not count.
    """
    total = float(torch.cat([*expected.values()]).norm())
    errors = {
        name: float((actual[name] - gradient).norm()) / (float(gradient.norm()) + 1e-3 * total)
        for name, gradient in expected.items()
    }
    name = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))  # NaN is the worst
    return errors[name], name


# ----------------------------------------------------------------------------------------------------------- LSTM, CTC


def lstm_layer(device: str, quick: bool) -> Iterator[Comparison]:
    """The LSTM of the listener against the reference of ops.bilstm: outputs and all gradients."""
    torch.manual_seed(0)
    T, sizes = (20, (6, 5)) if quick else (157, (80, 96))
    layer, lengths = BiLSTM(*sizes), torch.tensor([T, T - 1, T // 2, 2, 1])
    x, weights = torch.randn(5, T, sizes[0]), torch.randn(5, T, 2 * sizes[1])
    shape = f"B5 T{T} I{sizes[0]} H{sizes[1]}"

    def results(layer: BiLSTM, x: Tensor, lengths: Tensor, run: Callable[..., Tensor]) -> list[Tensor]:
        layer.zero_grad()
        x = x.clone().requires_grad_()
        output = run(x, lengths)
        (output * weights.to(output)).sum().backward()
        return [output, x.grad, *(parameter.grad.clone() for parameter in layer.parameters())]

    def reference(x: Tensor, lengths: Tensor) -> Tensor:
        return ops.bilstm(x, lengths, *layer.lstm.all_weights, backend="reference")

    expected = [value.clone() for value in results(layer, x, lengths, reference)]
    layer = layer.to(device)
    output, *gradients = map(relative_error, results(layer, x.to(device), lengths.to(device), layer), expected)
    yield Comparison("listener's LSTM", output, 1e-4, shape)
    yield Comparison("listener's LSTM: gradients", max(gradients), 1e-3, shape)


def ctc(device: str, quick: bool) -> Iterator[Comparison]:
    """The CTC loss, its gradient and token times; one text is too long for its frames, one is empty."""
    torch.manual_seed(0)
    T, S, V = (20, 6, 9) if quick else (161, 60, 31)
    logits, tokens = torch.randn(4, T, V), torch.randint(1, V, (4, S))
    lengths, counts = torch.tensor([T, T - 7, S - 1, T]), torch.tensor([S, S // 2, S, 0])

    def results(where: str) -> tuple[Tensor, Tensor, Tensor]:
        x = logits.detach().to(where).requires_grad_()
        arguments = lengths.to(where), tokens.to(where), counts.to(where)
        losses = ops.ctc_loss(x, *arguments)
        losses.sum().backward()
        return losses, x.grad, ops.ctc_token_times(x, *arguments)

    names = ("loss", "gradient", "token times")
    for name, actual, expected in zip(names, results(device), results("cpu"), strict=True):
        yield Comparison(f"CTC: {name}", relative_error(actual, expected), 1e-4, f"B4 T{T} V{V} S{S}")


# ------------------------------------------------------------------------------------------------------------- decoder


def decoder(device: str, quick: bool) -> Iterator[Comparison]:
    """The decoder of hw4p2 on each backend of ops.speller_unroll: in float32 with sampled tokens, in bf16 without."""
    torch.manual_seed(0)
    config = load_config("hw4p2")
    model = build_model(shrunk(config) if quick else config)
    inputs = decoder_inputs(model.speller, *((3, 20, 9) if quick else (16, 161, 60)))
    shape = f"B{len(inputs.tokens)} T{inputs.keys.shape[1]} U{inputs.tokens.shape[1]}"
    for precision, dtype, tolerances in (("fp32", FLOAT32, (1e-4, 1e-3)), ("bf16", BFLOAT16, (3e-2, 1e-1))):
        if precision == "bf16":
            inputs = inputs._replace(sampled=torch.zeros_like(inputs.sampled))
        expected = decoder_results(model.speller, inputs, "cpu", backend="reference")
        for backend in backends_for("speller_unroll", device):
            actual = decoder_results(model.speller, inputs, device, backend=backend, precision=precision)
            logits, attention, *gradients = map(relative_error, actual, expected)
            output, gradient = tolerances
            yield Comparison(
                "decoder: logits and attention", max(logits, attention), output, shape, dtype, path=backend
            )
            yield Comparison("decoder: gradients", max(gradients), gradient, shape, dtype, path=backend)


class DecoderInputs(NamedTuple):
    """Arguments of ops.speller_unroll after the weights, and the gradients of its results."""

    keys: Tensor
    values: Tensor
    lengths: Tensor
    tokens: Tensor
    sampled: Tensor
    masks: list[Tensor]
    logits_gradient: Tensor
    attention_gradient: Tensor


def decoder_inputs(speller: Speller, B: int, T: int, U: int) -> DecoderInputs:
    V, sizes = speller.embedding.num_embeddings, [cell.size for cell in speller.cells]
    return DecoderInputs(
        keys=torch.randn(B, T, speller.attention.key.out_features),
        values=torch.randn(B, T, speller.attention.value.out_features),
        lengths=torch.linspace(1, T, B).long(),
        tokens=torch.randint(EOS, V, (B, U)),
        sampled=torch.rand(B, U) < 0.2,
        masks=[dropout_mask(torch.empty(B, size), 0.3) for size in sizes],
        logits_gradient=torch.randn(B, U, V - EOS),
        attention_gradient=torch.randn(B, U, T),
    )


def decoder_results(speller: Speller, inputs: DecoderInputs, device: str, **options: str) -> list[Tensor]:
    """Return the logits of all tokens that may be emitted, the attention weights, and all gradients."""
    speller = copy.deepcopy(speller).to(device)
    inputs = tree_map_only(Tensor, lambda x: x.to(device), inputs)
    keys, values = (x.detach().requires_grad_() for x in inputs[:2])
    logits, attention = ops.speller_unroll(speller.weights(), keys, values, *inputs[2:6], **options)
    results = [logits[..., EOS:], attention]
    torch.autograd.backward(results, list(inputs[6:]))
    gradients = [parameter.grad for parameter in speller.parameters() if parameter.grad is not None]
    return [*results, keys.grad, values.grad, *gradients]


# ---------------------------------------------------------------------------------------------------------- validation


class Noise:
    """A dataset of noise, with the attributes that a validation reads."""

    def __init__(self, count: int, size: int):
        generator = torch.Generator().manual_seed(0)
        counts = torch.randint(60, 240, (count,), generator=generator)
        self.items = [torch.randn(n, size, generator=generator) for n in counts.tolist()]
        self.frame_counts, self.ids = counts.numpy(), [f"noise-{i}" for i in range(count)]
        self.texts = ["SIX SEVEN EIGHT"[: 5 + i % 10] for i in range(count)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Tensor:
        return self.items[i]


def validation(device: str, quick: bool) -> Iterator[Comparison]:
    """The loss and the greedy hypotheses of a validation."""
    count = 4 if quick else 40

    def result(where: str) -> Validation:
        loaded = load_model(MODEL, where)
        config = with_training(loaded.config, pictures=0)
        data = Noise(count, config.features.input_size)
        with tempfile.TemporaryDirectory() as folder:
            return validate(loaded.model, data, loaded.vocabulary, config, torch.device(where), Path(folder), 1.0)

    actual, expected = result(device), result("cpu")
    different = sum(map(str.__ne__, actual.hypotheses, expected.hypotheses))
    loss = relative_error(torch.tensor(actual.loss), torch.tensor(expected.loss))
    yield Comparison("validation: loss", loss, 1e-3, f"{count} utterances")
    yield Comparison("validation: hypotheses that differ", different, 0, f"{count} utterances")


# -------------------------------------------------------------------------------------------------------------- search

SEARCHES = {
    "attention": {},
    "CTC": {"ctc_weight": 0.3},
    "n-gram": {"ngram_weight": 0.3},
    "coverage": {"coverage_weight": 0.1},
    "everything": {"ctc_weight": 0.3, "ngram_weight": 0.3, "coverage_weight": 0.1, "length_reward": 0.2,
                   "eos_threshold": 1.5, "minimum_share": 0.02},
    "no threshold": {"beam_threshold": 0.0},
    "beam 1": {"beam": 1},
    "beam 130": {"beam": 130},
    "bf16": {"precision": "bf16", "ctc_weight": 0.3},
}  # fmt: skip


WAYS = {  # argument `capture` of beam_search
    "cuda": {"step by step": False, "captured": True, "replayed": True},
    "cpu": {"step by step": False, "default": None},
}


def search(name: str, device: str, quick: bool) -> Iterator[Comparison]:
    """A search on the device, step by step and by CUDA graphs, against the reference on the CPU."""
    loaded = load_model(MODEL)
    config = dataclasses.replace(
        loaded.config.decoding, **{"precision": "fp32", "ctc_weight": 0.0, "maximum_share": 0.1, **SEARCHES[name]}
    )
    torch.manual_seed(0)
    lengths = torch.tensor([90, 31] if quick else [240, 239, 201, 160, 100, 33, 5])
    V = loaded.model.vocabulary_size
    bigrams = table_model(torch.log_softmax(torch.randn(V, V), -1), SOS)
    with torch.inference_mode():
        features = torch.randn(len(lengths), int(lengths.max()), loaded.model.input_size)
        memory = loaded.model.listen(features, lengths)
    expected = beam_search(loaded.model, memory, config, ngram=bigrams, backend="reference")
    model, memory = loaded.model.to(device), tree_map_only(Tensor, lambda x: x.to(device), memory)
    shape = f"B{len(lengths)} K{config.beam} T{memory.keys.shape[1]}"
    # One n-gram model for all ways: a graph is replayed only with the model that it was captured with.
    ngram, folded = fold_length_reward(bigrams.to(device), config, V, device)
    for way, capture in WAYS[device].items():
        actual = beam_search(model, memory, folded, ngram=ngram, capture=capture)
        low = config.precision == "bf16"
        yield from compare_hypotheses(f"search, {name}", actual, expected, shape, way, low=low)


def compare_hypotheses(
    what: str,
    actual: list[list[TokenHypothesis]],
    expected: list[list[TokenHypothesis]],
    shape: str,
    way: str,
    *,
    low: bool,
) -> Iterator[Comparison]:
    """Compare the best hypotheses: their texts, and their scores where the texts are equal. low: in bfloat16."""
    pairs = [(x[0], y[0]) for x, y in zip(actual, expected, strict=True)]
    equal = [(x, y) for x, y in pairs if x.text_tokens == y.text_tokens]
    dtype, texts, scores = (BFLOAT16, BF16_TEXTS, BF16_SCORES) if low else (FLOAT32, 0, 1e-3)
    yield Comparison(f"{what}: texts that differ", len(pairs) - len(equal), texts, shape, dtype, path=way)
    error = max((abs(x.score - y.score) for x, y in equal), default=0.0)
    yield Comparison(f"{what}: scores", error, scores, shape, dtype, path=way)


# Short ones first, for an error of the device; then what part `cases` leaves out.
CHECKS: dict[str, Callable[[str, bool], Iterator[Comparison]]] = {
    "decoder": decoder,
    "listener's LSTM": lstm_layer,
    "CTC": ctc,
    "training step of hw4p2": partial(training_step, "hw4p2"),
    "training step of an4": partial(training_step, "an4"),
    "validation": validation,
    **{f"search, {name}": partial(search, name) for name in SEARCHES},
}
