"""Whole beam searches and trainings on real utterances in which every Triton kernel runs as executed PTX.

Everything else stays in torch. Functions whose names start with executed_ are for a compiling worker process (see
process.py).
"""

import contextlib
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from checkpoints import make_trainer

from las_fast.checkpoint import load_model
from las_fast.config import TeacherForcingStage, load_config
from las_fast.data.batching import make_loader, sorted_batches
from las_fast.data.dataset import load_dataset, open_corpus
from las_fast.model import speller
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


def executed_training(archive, arch, steps):
    """`trained` on compiled PTX; return its results and the names of the kernels that ran, launch by launch."""
    from gpu_proof.emulator import executed

    with triton_on_the_cpu(), executed(arch=arch) as launches:
        results = trained(archive, "triton", steps)
    return *results, [launch.name for launch in launches]


def trained(archive, backend, steps):
    """Train a small model on AN4 with that backend of speller_unroll.

    A third of the tokens are sampled; the loss includes CTC and guided attention; the cells have dropout.

    Returns:
        the loss of each step, and {name: gradient} of the first step.
    """
    config = small_training()
    losses, first = [], {}
    with tempfile.TemporaryDirectory() as folder, unrolled_by(backend):
        trainer = make_trainer(archive, Path(folder, "run"), config)
        while trainer.progress.step < steps:
            for batch in trainer._rest_of_epoch():
                losses.append(float(trainer.train_step(batch)["loss"]))
                first = first or {name: x.grad.clone() for name, x in trainer.model.named_parameters()}
                if trainer.progress.step == steps:
                    break
    return losses, first


def small_training():
    """Preset an4 with small layers, a constant learning rate and batches of two short utterances."""
    config = load_config("an4")
    listener = replace(config.model.listener, conv_channels=(16,), lstm_size=12)
    speller_config = replace(config.model.speller, key_size=18, value_size=20, embedding_size=16, lstm_sizes=(24, 18))
    training = replace(
        config.training, learning_rate=1e-4, warmup_steps=0, schedule="constant", precision="fp32", ema_decay=0.0,
        teacher_forcing=(TeacherForcingStage(start=0.0, end=200.0, first=0.7, last=0.7),),
    )  # fmt: skip
    return replace(
        config,
        data=replace(config.data, utterances_per_batch=2, max_seconds=1.5),
        model=replace(config.model, listener=listener, speller=speller_config),
        training=training,
    )


@contextlib.contextmanager
def unrolled_by(backend):
    """Inside, the model's speller takes that backend of speller_unroll."""
    op = speller.speller_unroll
    with mock.patch.object(speller, "speller_unroll", lambda *a, **named: op(*a, **(named | {"backend": backend}))):
        yield
