"""Every tensor that an op takes is looked at: its dimensions, each of its sizes, its type and its device."""

from __future__ import annotations

import pytest
import test_beam_backtrack
import test_beam_gather
import test_beam_topk
import test_bilstm
import test_ctc_loss
import test_ctc_prefix
import test_masked_attention
import test_speller_search
import test_speller_unroll
import torch
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
    padding_mask,
    speller_search,
    speller_unroll,
)

BACKTRACK = ("tokens", "parents", "scores", "attended_frames")
OTHER = {torch.float32: torch.float64, torch.int64: torch.int32, torch.bool: torch.uint8, torch.uint8: torch.int8}


def changes(x: Tensor):
    """Yield (what, a tensor that differs from x in that alone)."""
    yield "one dimension more", x[None]
    yield "one dimension more at the end", x[..., None]
    if x.ndim:
        yield "one dimension less", x[0]
        yield "one dimension less at the end", x[..., 0]
    for d, size in enumerate(x.shape):
        if size > 1:
            yield f"{d} shorter", x.narrow(d, 0, size - 1)
    yield "another type", x.to(OTHER[x.dtype])


def of_bilstm():
    x, *weights = test_bilstm.inputs()
    lengths = torch.tensor([7, 3, 1])
    output, kept = torch.ops.las_fast.bilstm_cpp(x, lengths, weights, True)
    names = {"x": x, "lengths": lengths, "weights": weights}
    yield "bilstm_cpp", {**names, "gradients": True}, {("x", "1 shorter")}  # lengths are taken for the nearest
    yield "bilstm_backward_cpp", {"gradient": output, **names, "output": output, "kept": kept, "inputs": True}, set()


def of_masked_attention():
    query, keys, values = test_masked_attention.inputs()
    names = {"query": query, "keys": keys, "values": values, "lengths": torch.tensor([7, 3, 1])}
    free = {("query", "1 shorter"), ("values", "2 shorter")}
    yield "masked_attention_cpp", {**names, "scale": 1.0, "weights": True}, free
    context, weights, _, logsumexp = torch.ops.las_fast.masked_attention_cpp(*names.values(), 1.0, True)
    given = {"context_gradient": context, "weights_gradient": weights, **names}
    rest = {"weights": weights, "logsumexp": logsumexp, "scale": 1.0, "memory": True}
    unused = torch.zeros(1)
    arguments = {**given, "context": unused, **rest}
    yield "masked_attention_backward_cpp", arguments, {(name, None) for name in ("context", "logsumexp")}


def of_beams():
    names = dict(zip(BACKTRACK, test_beam_backtrack.random(6, 2, 3), strict=True))
    yield "beam_backtrack_cpp", {**names, "eos": 2}, set()
    states, parents = test_beam_gather.make(2, 3, (5, 4))
    free = {("states", "2 shorter"), ("states", "another type")}
    yield "beam_gather_cpp", {"states": states, "parents": parents}, free
    names = ["logits", "scores", "finished", "lengths", "eos", "minimum", "maximum", "length_penalty", "eos_threshold"]
    names += ["coverage", "ngram_table", "ngram_states", "ngram_weight", "ctc_next_log_probs", "ctc_weight"]
    given = dict(zip(names, test_beam_topk.arguments(), strict=True))
    yield "beam_topk_cpp", given, set()


def of_ctc():
    yield "ctc_prefix_cpp", test_ctc_prefix.changed(), set()
    logits, lengths, tokens, token_lengths = test_ctc_loss.inputs()
    names = {"logits": logits, "lengths": lengths, "tokens": tokens, "token_lengths": token_lengths}
    tokens[0, 0], token_lengths[0] = logits.shape[2] - 1, max(1, int(token_lengths[0]))
    yield "ctc_loss_cpp", {**names, "gradients": True}, set()
    yield "ctc_places_cpp", names, set()


def of_speller():
    weights, keys, values, lengths, tokens, sampled, masks = test_speller_unroll.inputs(*test_speller_unroll.SIZES[2])
    memory = {"keys": keys, "values": values, "lengths": lengths}
    given = {"weights": list(weights.flat()), **memory, "tokens": tokens, "sampled": sampled, "masks": masks}
    yield "speller_unroll_cpp", {**given, "bf16": False, "gradients": True}, set()
    logits, attention, *kept = torch.ops.las_fast.speller_unroll_cpp(*given.values(), False, True)
    saved = dict(zip(("attention", "read", "operands", "states"), (attention, *kept), strict=True))
    back = {"logits_gradient": logits, "attention_gradient": attention, **given}
    del back["tokens"], back["sampled"]
    yield "speller_unroll_backward_cpp", {**back, **saved, "bf16": False}, set()
    B, V = len(lengths), len(weights.bias)
    limit = torch.full((B,), 3)
    search = {"weights": list(weights.flat()), **memory, "beam": 3, "sos": 1, "eos": 2}
    search |= {"minimum": limit, "maximum": limit}
    search |= {"length_penalty": 0.5, "eos_threshold": 0.0, "coverage_weight": 0.0}
    search |= {"ngram_table": torch.zeros(V, V), "ngram_weight": 0.1}
    search |= {"ctc_log_probs": test_speller_search.hear(B, 9, V), "ctc_weight": 0.1, "precision": "fp32"}
    packed = torch.ops.las_fast.speller_pack_cpp(search["weights"], "fp32")
    free = {("ngram_table", "0 shorter"), ("ctc_log_probs", "1 shorter"), ("packed", "one dimension more")}
    free |= {("packed", "one dimension more at the end")}
    yield "speller_search_cpp", {**search, "packed": packed}, free


def calls():
    for make in (of_bilstm, of_masked_attention, of_beams, of_ctc, of_speller):
        yield from make()


def wrong_calls(arguments, free):
    """Yield (what is wrong, arguments) with one tensor changed."""
    for name, value in arguments.items():
        several = value if isinstance(value, (list, tuple)) else [value]
        for i, x in enumerate(several):
            for what, changed in changes(x) if isinstance(x, Tensor) else ():
                if {(name, what), (name, None)} & free:
                    continue
                new = [changed if i == j else y for j, y in enumerate(several)]
                yield f"{name}[{i}]: {what}", {**arguments, name: new if several is value else new[0]}


def test_a_tensor_of_another_shape_or_type_is_refused_with_a_sentence(cpp):
    accepted, unexplained = [], []
    for op, arguments, free in calls():
        call = getattr(torch.ops.las_fast, op)
        call(*arguments.values())  # these are in order
        for what, wrong in wrong_calls(arguments, free):
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


# ------------------------------------------------------------------------------------------ what is called in Python

LENGTHS = torch.tensor([7, 3, 1])


def attending():
    query, keys, values = test_masked_attention.inputs()
    names = {"query": query, "keys": keys, "values": values, "lengths": LENGTHS, "padding": padding_mask(LENGTHS, 7)}
    free = {("query", "1 shorter"), ("values", "2 shorter"), ("padding", "another device")}
    yield masked_attention, names, free


def searching():
    names = dict(zip(BACKTRACK, test_beam_backtrack.random(6, 2, 3), strict=True))
    yield lambda **given: beam_backtrack(**given, eos=2, backend="reference"), names, set()
    states, parents = test_beam_gather.make(2, 3, (5, 4))
    free = {("states", "2 shorter"), ("states", "another type")}
    yield lambda **given: beam_gather(**given, backend="reference"), {"states": states, "parents": parents}, free
    names = ["logits", "scores", "finished", "lengths", "eos", "minimum", "maximum", "length_penalty", "eos_threshold"]
    names += ["coverage", "ngram_table", "ngram_states", "ngram_weight", "ctc_next_log_probs", "ctc_weight"]
    given = dict(zip(names, test_beam_topk.arguments(), strict=True))
    tensors = {name: x for name, x in given.items() if isinstance(x, Tensor)}

    def step(ngram_table, ngram_states, ctc_next_log_probs, **others):
        ngram, ctc = Ngram(ngram_table, ngram_states, 0.3), Ctc(ctc_next_log_probs, 0.3)
        return beam_topk(**others, eos=2, ngram=ngram, ctc=ctc, backend="reference")

    yield step, tensors, {("logits", "another type")}


def hearing():
    x, *weights = test_bilstm.inputs()
    names = {"x": x, "lengths": LENGTHS, "forwards": weights[:4], "backwards": weights[4:]}
    free = {("x", "1 shorter"), ("x", "another type")}
    free |= {(name, "another type") for name in ("forwards", "backwards")}  # taken to that of x
    yield lambda **given: bilstm(**given, backend="reference"), names, free
    names = dict(zip(("logits", "lengths", "tokens", "token_lengths"), test_ctc_loss.inputs(), strict=True))
    free = {("logits", what) for what in ("another type", "1 shorter", "2 shorter")} | {("tokens", "1 shorter")}
    for op in (ctc_loss, ctc_token_times):
        yield lambda op=op, **given: op(**given, backend="reference"), names, free
    names = test_ctc_prefix.changed()
    del names["eos"]

    def step(ctc_log_probs, forward_log_probs, prefix_log_probs, next_log_probs, **others):
        state = CtcState(forward_log_probs, prefix_log_probs, next_log_probs)
        return ctc_prefix(ctc_log_probs, state, **others, eos=2, backend="reference")

    yield step, names, set()


def spelling():
    weights, keys, values, lengths, tokens, sampled, masks = test_speller_unroll.inputs(*test_speller_unroll.SIZES[2])
    memory = {"keys": keys, "values": values, "lengths": lengths}
    B, V = len(lengths), len(weights.bias)
    free = {(name, "another device") for name in ("tokens", "sampled", "masks", *memory)} | {("masks", "another type")}
    given = {**memory, "tokens": tokens, "sampled": sampled, "masks": masks}
    yield lambda **given: speller_unroll(weights, **given, backend="reference"), given, free
    limit, ctc_log_probs = torch.full((B,), 3), test_speller_search.hear(B, 9, V)
    given = {**memory, "minimum": limit, "maximum": limit, "ngram_table": torch.zeros(V, V)}
    given |= {"ctc_log_probs": ctc_log_probs}
    fixed = {"beam": 3, "sos": 1, "eos": 2, "ctc_weight": 0.3, "backend": "reference"}
    free = {(name, "another device") for name in given}
    free |= {("ngram_table", "0 shorter"), ("ctc_log_probs", "1 shorter")}
    yield lambda **given: speller_search(weights, **given, **fixed), given, free


@pytest.mark.parametrize("make", [attending, searching, hearing, spelling])
def test_what_disagrees_is_a_value_error_before_anything_is_computed(make):
    accepted, unexplained = [], []
    for number, (op, arguments, free) in enumerate(make()):
        op(**arguments)
        wrong = [*wrong_calls(arguments, free), *on_another_device(arguments, free)]
        assert len(wrong) > 10
        for what, given in wrong:
            try:
                op(**given)
            except ValueError as error:
                if "must" not in str(error):
                    unexplained.append(f"{number} {what}: {str(error).splitlines()[0]}")
            except (RuntimeError, IndexError, NotImplementedError, AssertionError) as error:
                unexplained.append(f"{number} {what}: {type(error).__name__} {str(error).splitlines()[0]}")
            else:
                accepted.append(f"{number} {what}")
    assert not accepted and not unexplained, "\n".join([*accepted, "--", *unexplained])


def whole(value):
    if isinstance(value, (list, tuple)):
        return [whole(x) for x in value]
    return value.long() if value.is_floating_point() else value


@pytest.mark.parametrize("make", [attending, searching, hearing, spelling])
def test_whole_numbers_in_place_of_floats_are_refused(make):
    for op, arguments, _ in make():
        if "states" in arguments and "parents" in arguments:
            continue  # beam_gather moves what it is given
        with pytest.raises(ValueError, match="must"):
            op(**{name: whole(value) for name, value in arguments.items()})


def on_another_device(arguments, free):
    for name, value in arguments.items():
        several = value if isinstance(value, (list, tuple)) else [value]
        for i, x in enumerate(several if (name, "another device") not in free else ()):
            new = [x.to("meta") if i == j else y for j, y in enumerate(several)]
            yield f"{name}[{i}]: another device", {**arguments, name: new if several is value else new[0]}
