"""Rung 0: check the registration of the Triton ops with torch. Call these functions in an interpreting worker."""

import math

import torch
from automata import random_model

from gpu_proof.cases import unroll_inputs
from gpu_proof.end_to_end import triton_on_the_cpu
from gpu_proof.interpreter import fast
from las_fast.ops import (
    CtcState,
    Ngram,
    NgramModel,
    SpellerWeights,
    beam_backtrack,
    beam_gather,
    beam_topk,
    ctc_loss,
    ctc_prefix,
    masked_attention,
    ngram_scores,
    speller_unroll,
)

EOS = 2


def attention_inputs(grad=False):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(s, generator=generator).requires_grad_(grad) for s in ((2, 3, 5), (2, 7, 5), (2, 7, 6))]
    return *tensors, torch.tensor([7, 4])


def search_inputs():
    generator = torch.Generator().manual_seed(0)
    logits, scores = torch.randn(2, 3, 5, generator=generator), -torch.rand(2, 3, generator=generator)
    return logits, scores, scores < -0.8, torch.full((2, 3), 4)


def backtrack_inputs():
    generator = torch.Generator().manual_seed(0)
    tokens, parents, frames = (torch.randint(0, 3, (4, 2, 3), generator=generator) for _ in range(3))
    return tokens, parents, -torch.rand(4, 2, 3, generator=generator), frames


def prefix_inputs():
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 6, 5), (2, 3, 7), (2, 3), (2, 3, 5)
    tensors = [-torch.rand(s, generator=generator) for s in shapes]
    return *tensors, *(torch.randint(0, 3, (2, 3), generator=generator) for _ in range(3))


def ngram_inputs():
    model = random_model(5, 3)
    return model.rows, model.arcs, model.vocabulary_size, model.order, torch.tensor([[0, 1, 2], [3, 2, 1]])


def unroll_arguments(grad=False):
    """Arguments of the registered op speller_unroll, without its two flags."""
    weights, keys, values, *others = unroll_inputs(5, 4, (3, 6), 4, 5, 7, 2, 3, (7, 4), True, 0.5, 1.0, 0)
    for x in (*weights, keys, values):
        x.requires_grad_(grad)
    return [weights, keys, values, *others]


def ctc_inputs(grad=False):
    generator = torch.Generator().manual_seed(0)
    logits, tokens = torch.randn(2, 9, 5, generator=generator), torch.randint(1, 5, (2, 3), generator=generator)
    return logits.requires_grad_(grad), torch.tensor([9, 6]), tokens, torch.tensor([3, 2])


def check_op(name):
    """Run torch.library.opcheck on one op; raises if its schema, fake or gradient is wrong."""
    fast()
    bound, step = torch.tensor([1, 2]), [torch.ones(2, 3, dtype=torch.int64)] * 2
    arguments = {
        "masked_attention": [(*attention_inputs(grad), 0.4, w) for grad in (False, True) for w in (False, True)],
        "beam_topk": [
            (*search_inputs(), EOS, None, None, 0.0, 0.0, None, None, 0.0, None, 0.0, math.inf),
            (*search_inputs(), EOS, bound, 9 * bound, 1.0, 0.5, torch.zeros(2, 3), torch.zeros(2, 3, 5),
             0.3, torch.zeros(2, 3, 5), 0.4, 2.0),
        ],
        "beam_gather": [([torch.randn(2, 3, 4), torch.zeros(2, 3, 1).bool()], torch.tensor([[0, 0, 2], [1, 2, 0]]))],
        "ctc_prefix": [(*prefix_inputs(), EOS)],
        "ngram_scores": [(*ngram_inputs(), None, None), (*ngram_inputs(), *step)],
        "ctc_loss": [(*ctc_inputs(grad), grad) for grad in (False, True)],
        "beam_backtrack": [(*backtrack_inputs(), EOS)],
        "speller_unroll": [(*unroll_arguments(grad), bf16, grad) for grad in (False, True) for bf16 in (False, True)],
    }[name]  # fmt: skip
    for args in arguments:
        torch.library.opcheck(getattr(torch.ops.las_fast, f"{name}_triton").default, args)


def compile_ops():
    """Compile each op with backend="triton" and return {op: number of graphs}. Raises on a graph break."""
    fast()
    graphs = {}

    def compile_and_compare(name, function, *arguments):
        def count(graph, _):
            graphs[name] = graphs.get(name, 0) + 1
            return graph.forward

        results = torch.compile(function, fullgraph=True, backend=count)(*arguments)
        for x, y in zip(results, function(*arguments), strict=True):
            assert torch.equal(x, y), name
        return results

    log_probs = torch.zeros(2, 3, 5)
    with triton_on_the_cpu():
        query, keys, values, lengths = attention_inputs(grad=True)
        attended = compile_and_compare("masked_attention", lambda *x: masked_attention(*x, backend="triton"),
                        query, keys, values, lengths)  # fmt: skip
        attended[0].sum().backward()
        assert all(x.grad is not None and x.grad.isfinite().all() for x in (query, keys, values))
        compile_and_compare("beam_topk", lambda a, b, c, n: beam_topk(
            a, b, c, eos=EOS, lengths=n, ngram=Ngram(log_probs, 0.3), backend="triton"), *search_inputs())  # fmt: skip
        compile_and_compare("beam_gather", lambda x, p: beam_gather([x, x], p, backend="triton"),
                torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64))  # fmt: skip
        compile_and_compare("ctc_loss", lambda *x: (ctc_loss(*x, backend="triton"),), *ctc_inputs(grad=True))
        rows, arcs, V, order, states = ngram_inputs()
        compile_and_compare("ngram_scores", lambda r, a, s: ngram_scores(
            NgramModel(r, a, V, order, 0), s, backend="triton"), rows, arcs, states)  # fmt: skip
        compile_and_compare("ctc_prefix", lambda f, a, p, g, *x: ctc_prefix(
            f, CtcState(a, p, g), *x, eos=EOS, backend="triton"), *prefix_inputs())  # fmt: skip
        weights, *others, masks = unroll_arguments()
        flat = SpellerWeights.from_flat(weights)
        compile_and_compare("speller_unroll", lambda *x: speller_unroll(*x, masks, backend="triton"), flat, *others)
        compile_and_compare(
            "beam_backtrack", lambda *x: beam_backtrack(*x, eos=EOS, backend="triton"), *backtrack_inputs()
        )
    return graphs
