"""Every op checks the number of dimensions, each size, the dtype and the device of every tensor argument."""

from __future__ import annotations

from dataclasses import replace

import pytest
import test_beam_backtrack
import test_beam_gather
import test_beam_topk
import test_bilstm
import test_ctc_loss
import test_ctc_prefix
import test_masked_attention
import test_ngram_scores
import test_speller_search
import test_speller_unroll
import torch
from automata import random_model
from torch import Tensor

from las_fast.ops import (
    Ctc,
    CtcState,
    Ngram,
    beam_backtrack,
    beam_gather,
    beam_topk,
    bilstm,
    ctc_loss,
    ctc_prefix,
    ctc_token_times,
    masked_attention,
    ngram_scores,
    padding_mask,
    speller_search,
    speller_unroll,
    table_model,
)

BACKTRACK = ("tokens", "parents", "scores", "attended_frames")
OTHER = {torch.float32: torch.float64, torch.int64: torch.int32, torch.bool: torch.uint8, torch.uint8: torch.int8}
OTHER |= {torch.int32: torch.int64}


def altered(x: Tensor):
    """Yield (description, tensor that differs from x only in that)."""
    yield "one dimension more", x[None]
    yield "one dimension more at the end", x[..., None]
    if x.ndim:
        yield "one dimension less", x[0]
        yield "one dimension less at the end", x[..., 0]
    for d, size in enumerate(x.shape):
        if size > 1:
            yield f"{d} shorter", x.narrow(d, 0, size - 1)
    yield "another type", x.to(OTHER[x.dtype])


def bilstm_calls():
    x, *weights = test_bilstm.inputs()
    lengths = torch.tensor([7, 3, 1])
    output, kept = torch.ops.las_fast.bilstm_cpp(x, lengths, weights, True)
    names = {"x": x, "lengths": lengths, "weights": weights}
    yield "bilstm_cpp", {**names, "gradients": True}, {("x", "1 shorter")}  # lengths are clamped
    yield "bilstm_backward_cpp", {"gradient": output, **names, "output": output, "kept": kept, "inputs": True}, set()


def attention_calls():
    query, keys, values = test_masked_attention.inputs()
    names = {"query": query, "keys": keys, "values": values, "lengths": torch.tensor([7, 3, 1])}
    unchecked = {("query", "1 shorter"), ("values", "2 shorter")}
    yield "masked_attention_cpp", {**names, "scale": 1.0, "weights": True}, unchecked
    context, weights, _, logsumexp = torch.ops.las_fast.masked_attention_cpp(*names.values(), 1.0, True)
    inputs = {"context_gradient": context, "weights_gradient": weights, **names}
    rest = {"weights": weights, "logsumexp": logsumexp, "scale": 1.0, "memory": True}
    unused = torch.zeros(1)
    arguments = {**inputs, "context": unused, **rest}
    yield "masked_attention_backward_cpp", arguments, {(name, None) for name in ("context", "logsumexp")}


def beam_calls():
    names = dict(zip(BACKTRACK, test_beam_backtrack.random(6, 2, 3), strict=True))
    yield "beam_backtrack_cpp", {**names, "eos": 2}, set()
    states, parents = test_beam_gather.make(2, 3, (5, 4))
    unchecked = {("states", "2 shorter"), ("states", "another type")}
    yield "beam_gather_cpp", {"states": states, "parents": parents}, unchecked
    names = ["logits", "scores", "finished", "lengths", "eos", "minimum", "maximum", "length_penalty", "eos_threshold"]
    names += ["coverage", "ngram_log_probs", "ngram_weight", "ctc_next_log_probs", "ctc_weight", "beam_threshold"]
    arguments = dict(zip(names, test_beam_topk.arguments(), strict=True))
    yield "beam_topk_cpp", arguments, set()
    model = random_model(9, 3)
    states, parents, tokens = test_ngram_scores.inputs(model)
    arguments = {"rows": model.rows, "arcs": model.arcs, "vocabulary_size": 9, "order": 3, "states": states}
    unchecked = {("rows", "0 shorter"), ("arcs", "0 shorter")}
    yield "ngram_scores_cpp", {**arguments, "parents": parents, "tokens": tokens}, unchecked


def ctc_calls():
    yield "ctc_prefix_cpp", test_ctc_prefix.changed(), set()
    logits, lengths, tokens, token_lengths = test_ctc_loss.inputs()
    names = {"logits": logits, "lengths": lengths, "tokens": tokens, "token_lengths": token_lengths}
    tokens[0, 0], token_lengths[0] = logits.shape[2] - 1, max(1, int(token_lengths[0]))
    yield "ctc_loss_cpp", {**names, "gradients": True}, set()
    yield "ctc_token_times_cpp", names, set()


def speller_calls():
    weights, keys, values, lengths, tokens, sampled, masks = test_speller_unroll.inputs(*test_speller_unroll.SIZES[2])
    memory = {"keys": keys, "values": values, "lengths": lengths}
    inputs = {"weights": list(weights.flat()), **memory, "tokens": tokens, "sampled": sampled, "masks": masks}
    yield "speller_unroll_cpp", {**inputs, "bf16": False, "gradients": True}, set()
    logits, attention, *kept = torch.ops.las_fast.speller_unroll_cpp(*inputs.values(), False, True)
    saved = dict(zip(("attention", "read", "operands", "states"), (attention, *kept), strict=True))
    back = {"logits_gradient": logits, "attention_gradient": attention, **inputs}
    del back["tokens"], back["sampled"]
    yield "speller_unroll_backward_cpp", {**back, **saved, "bf16": False}, set()
    B, V = len(lengths), len(weights.bias)
    limit = torch.full((B,), 3)
    search = {"weights": list(weights.flat()), **memory, "beam": 3, "sos": 1, "eos": 2}
    search |= {"minimum": limit, "maximum": limit}
    search |= {"length_penalty": 0.5, "eos_threshold": 0.0, "coverage_weight": 0.0}
    model = table_model(torch.zeros(V, V), 1)
    search |= {"ngram_rows": model.rows, "ngram_arcs": model.arcs, "ngram_order": 2, "ngram_start": model.start}
    search |= {"ngram_weight": 0.1}
    search |= {
        "ctc_log_probs": test_speller_search.random_ctc_log_probs(B, 9, V),
        "ctc_weight": 0.1,
        "beam_threshold": 2.0,
        "precision": "fp32",
    }
    packed = torch.ops.las_fast.speller_pack_cpp(search["weights"], "fp32")
    unchecked = {("ngram_rows", "0 shorter"), ("ngram_arcs", "0 shorter"), ("ctc_log_probs", "1 shorter")}
    unchecked |= {("packed", "one dimension more")}
    unchecked |= {("packed", "one dimension more at the end")}
    yield "speller_search_cpp", {**search, "packed": packed}, unchecked


def native_calls():
    for make in (bilstm_calls, attention_calls, beam_calls, ctc_calls, speller_calls):
        yield from make()


def altered_calls(arguments, unchecked):
    """Yield (description, arguments) with one tensor altered."""
    for name, value in arguments.items():
        tensors = value if isinstance(value, (list, tuple)) else [value]
        for i, x in enumerate(tensors):
            for what, changed in altered(x) if isinstance(x, Tensor) else ():
                if {(name, what), (name, None)} & unchecked:
                    continue
                new = [changed if i == j else y for j, y in enumerate(tensors)]
                yield f"{name}[{i}]: {what}", {**arguments, name: new if tensors is value else new[0]}


def test_a_registered_op_refuses_tensors_of_other_shapes_and_dtypes(cpp):
    accepted, unexplained = [], []
    for op, arguments, unchecked in native_calls():
        call = getattr(torch.ops.las_fast, op)
        call(*arguments.values())  # valid
        for what, wrong in altered_calls(arguments, unchecked):
            try:
                call(*wrong.values())
            except RuntimeError as error:
                if "must" not in str(error):
                    unexplained.append(f"{op} {what}: {str(error).splitlines()[0]}")
            except (IndexError, NotImplementedError) as error:
                unexplained.append(f"{op} {what}: {str(error).splitlines()[0]}")
            else:
                accepted.append(f"{op} {what}")
    assert not accepted and not unexplained, "\n".join([*accepted, *unexplained])


# ----------------------------------------------------------------------------------------------- Python functions

LENGTHS = torch.tensor([7, 3, 1])


def attention_functions():
    query, keys, values = test_masked_attention.inputs()
    names = {"query": query, "keys": keys, "values": values, "lengths": LENGTHS, "padding": padding_mask(LENGTHS, 7)}
    unchecked = {("query", "1 shorter"), ("values", "2 shorter"), ("padding", "another device")}
    yield masked_attention, names, unchecked


def beam_functions():
    names = dict(zip(BACKTRACK, test_beam_backtrack.random(6, 2, 3), strict=True))
    yield lambda **inputs: beam_backtrack(**inputs, eos=2, backend="reference"), names, set()
    states, parents = test_beam_gather.make(2, 3, (5, 4))
    unchecked = {("states", "2 shorter"), ("states", "another type")}
    yield lambda **inputs: beam_gather(**inputs, backend="reference"), {"states": states, "parents": parents}, unchecked
    names = ["logits", "scores", "finished", "lengths", "eos", "minimum", "maximum", "length_penalty", "eos_threshold"]
    names += ["coverage", "ngram_log_probs", "ngram_weight", "ctc_next_log_probs", "ctc_weight", "beam_threshold"]
    inputs = dict(zip(names, test_beam_topk.arguments(), strict=True))
    tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}

    def step(ngram_log_probs, ctc_next_log_probs, **others):
        ngram, ctc = Ngram(ngram_log_probs, 0.3), Ctc(ctc_next_log_probs, 0.3)
        return beam_topk(**others, eos=2, ngram=ngram, ctc=ctc, backend="reference")

    yield step, tensors, {("logits", "another type")}
    model = random_model(9, 3)
    names = dict(zip(("states", "parents", "tokens"), test_ngram_scores.inputs(model), strict=True))

    def score(rows, arcs, **others):
        return ngram_scores(replace(model, rows=rows, arcs=arcs), **others, backend="reference")

    unchecked = {("rows", "0 shorter"), ("arcs", "0 shorter")}
    yield score, {"rows": model.rows, "arcs": model.arcs, **names}, unchecked


def encoder_functions():
    x, *weights = test_bilstm.inputs()
    names = {"x": x, "lengths": LENGTHS, "forwards": weights[:4], "backwards": weights[4:]}
    unchecked = {("x", "1 shorter"), ("x", "another type")}
    unchecked |= {(name, "another type") for name in ("forwards", "backwards")}  # converted to the dtype of x
    yield lambda **inputs: bilstm(**inputs, backend="reference"), names, unchecked
    names = dict(zip(("logits", "lengths", "tokens", "token_lengths"), test_ctc_loss.inputs(), strict=True))
    unchecked = {("logits", what) for what in ("another type", "1 shorter", "2 shorter")} | {("tokens", "1 shorter")}
    for op in (ctc_loss, ctc_token_times):
        yield lambda op=op, **inputs: op(**inputs, backend="reference"), names, unchecked
    names = test_ctc_prefix.changed()
    del names["eos"]

    def step(ctc_log_probs, forward_log_probs, prefix_log_probs, next_log_probs, **others):
        state = CtcState(forward_log_probs, prefix_log_probs, next_log_probs)
        return ctc_prefix(ctc_log_probs, state, **others, eos=2, backend="reference")

    yield step, names, set()


def speller_functions():
    weights, keys, values, lengths, tokens, sampled, masks = test_speller_unroll.inputs(*test_speller_unroll.SIZES[2])
    memory = {"keys": keys, "values": values, "lengths": lengths}
    B, V = len(lengths), len(weights.bias)
    inputs = {**memory, "tokens": tokens, "sampled": sampled, "masks": masks}
    yield lambda **inputs: speller_unroll(weights, **inputs, backend="reference"), inputs, set()
    limit, ctc_log_probs = torch.full((B,), 3), test_speller_search.random_ctc_log_probs(B, 9, V)
    inputs = {**memory, "minimum": limit, "maximum": limit}
    inputs |= {"ctc_log_probs": ctc_log_probs}
    fixed = {"beam": 3, "sos": 1, "eos": 2, "ctc_weight": 0.3, "backend": "reference"}
    unchecked = {("ctc_log_probs", "1 shorter")}
    yield lambda **inputs: speller_search(weights, **inputs, **fixed), inputs, unchecked


@pytest.mark.parametrize("make", [attention_functions, beam_functions, encoder_functions, speller_functions])
def test_disagreeing_tensors_are_a_value_error(make):
    accepted, unexplained = [], []
    for number, (op, arguments, unchecked) in enumerate(make()):
        op(**arguments)
        wrong = [*altered_calls(arguments, unchecked), *on_another_device(arguments, unchecked)]
        assert len(wrong) > 10
        for what, changed in wrong:
            try:
                op(**changed)
            except ValueError as error:
                if "must" not in str(error):
                    unexplained.append(f"{number} {what}: {str(error).splitlines()[0]}")
            except (RuntimeError, IndexError, NotImplementedError, AssertionError) as error:
                unexplained.append(f"{number} {what}: {type(error).__name__} {str(error).splitlines()[0]}")
            else:
                accepted.append(f"{number} {what}")
    assert not accepted and not unexplained, "\n".join([*accepted, "--", *unexplained])


def to_integers(value):
    if isinstance(value, (list, tuple)):
        return [to_integers(x) for x in value]
    return value.long() if value.is_floating_point() else value


@pytest.mark.parametrize("make", [attention_functions, beam_functions, encoder_functions, speller_functions])
def test_integers_in_place_of_floats_are_refused(make):
    for op, arguments, _ in make():
        if "states" in arguments and "parents" in arguments:
            continue  # beam_gather takes any dtype
        with pytest.raises(ValueError, match="must"):
            op(**{name: to_integers(value) for name, value in arguments.items()})


def on_another_device(arguments, unchecked):
    for name, value in arguments.items():
        tensors = value if isinstance(value, (list, tuple)) else [value]
        for i, x in enumerate(tensors if (name, "another device") not in unchecked else ()):
            new = [x.to("meta") if i == j else y for j, y in enumerate(tensors)]
            yield f"{name}[{i}]: another device", {**arguments, name: new if tensors is value else new[0]}
