"""Whole beam searches of real utterances in which every Triton kernel runs as executed PTX.

The listener and the LSTM cells stay in torch. `executed_decode` is for a compiling worker process (see process.py).
"""

import contextlib
from dataclasses import replace
from pathlib import Path

import torch

from las_fast.checkpoint import load_model
from las_fast.data.batching import make_loader, sorted_batches
from las_fast.data.dataset import load_dataset, open_corpus
from las_fast.ops import backends
from las_fast.search.beam import beam_search

CHECKPOINT = Path(__file__).parents[1] / "an4-small.safetensors"
BEAM = 4


@contextlib.contextmanager
def triton_on_the_cpu():
    """Let backend="triton" take CPU tensors, for a process in which something stands in for the GPU."""
    problem, device = backends._triton_problem, backends.DEVICES["triton"]
    backends._triton_problem, backends.DEVICES["triton"] = lambda: None, "cpu"
    try:
        yield
    finally:
        backends._triton_problem, backends.DEVICES["triton"] = problem, device


def decode(archive, backend, utterances=None):
    """Beam-search the development set, or its first `utterances`; return (id, tokens, score) of the n best of each."""
    loaded = load_model(CHECKPOINT)
    settings = replace(loaded.config.decoding, beam=BEAM)
    options = {"features": loaded.config.features, "data": loaded.config.data, "statistics": None, "need_text": False}
    dev = load_dataset(open_corpus(archive), ("dev",), **options)
    batches = sorted_batches(dev.frame_counts, frames_per_batch=10000, utterances_per_batch=utterances or 64)
    found = []
    for batch in make_loader(dev, batches, loaded.vocabulary, augment=None, seed=0, epoch=0, workers=0):
        with torch.inference_mode():
            memory = loaded.model.listen(batch.features, batch.feature_lengths)
        hypotheses = beam_search(loaded.model, memory, settings, nbest=BEAM, backend=backend, capture=False)
        for i, several in zip(batch.indices.tolist(), hypotheses, strict=True):
            found.append((dev.ids[i], [(h.text_tokens, h.score, h.attended_frames) for h in several]))
        if utterances:
            break
    return found


def executed_decode(archive, arch, utterances=None):
    """The same on compiled PTX; return what was found and the names of the kernels that ran, launch by launch."""
    from gpu_proof.emulator import executed

    with triton_on_the_cpu(), executed(arch=arch) as launches:
        found = decode(archive, "triton", utterances)
    return found, [launch.name for launch in launches]


def executed_small_search(arch, seed, **settings):
    """Return (tokens, score) of the best hypotheses of the toy model, searched on compiled PTX."""
    from toy_model import ToyModel, config, memory

    from gpu_proof.emulator import executed

    with triton_on_the_cpu(), executed(arch=arch):
        found = beam_search(
            ToyModel(), memory([seed], [4]), config(**settings), nbest=5, backend="triton", capture=False
        )
    return [(tuple(h.text_tokens), h.score) for h in found[0]]
