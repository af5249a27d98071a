"""Beam searches and trainings on real utterances, with the compiled PTX of every Triton kernel executed on the CPU.

Everything else runs in torch. Call the functions whose names start with executed_ in a compiling worker process (see
process.py).
"""

import contextlib
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from an4_small import load_an4_small
from tiny_checkpoints import make_trainer

from las_fast.config import TeacherForcingStage, load_config
from las_fast.data.batch import make_loader
from las_fast.data.batch_plan import sorted_batches
from las_fast.model import speller
from las_fast.ops import backends
from las_fast.search.beam import beam_search

BEAM = 4


@contextlib.contextmanager
def triton_on_the_cpu():
    """Let backend="triton" accept CPU tensors inside the block, where kernels are interpreted or executed."""
    problem, device = backends._triton_problem, backends.DEVICES["triton"]
    backends._triton_problem, backends.DEVICES["triton"] = lambda: None, "cpu"
    try:
        yield
    finally:
        backends._triton_problem, backends.DEVICES["triton"] = problem, device


def decode(archive, backend, utterances=None):
    """Decode the development set, or its first `utterances`.

    Returns [(id, [(tokens, score, attended_frames) of each of the BEAM best hypotheses])].
    """
    loaded, dev = load_an4_small(archive)
    settings = replace(loaded.config.decoding, beam=BEAM)
    batches = sorted_batches(dev.frame_counts, frames_per_batch=10000, utterances_per_batch=utterances or 64)
    decoded = []
    for batch in make_loader(dev, batches, loaded.vocabulary, augment=None, seed=0, epoch=0, workers=0):
        with torch.inference_mode():
            memory = loaded.model.listen(batch.features, batch.feature_lengths)
        hypotheses = beam_search(loaded.model, memory, settings, nbest=BEAM, backend=backend, capture=False)
        for i, best in zip(batch.indices.tolist(), hypotheses, strict=True):
            decoded.append((dev.ids[i], [(h.text_tokens, h.score, h.attended_frames) for h in best]))
        if utterances:
            break
    return decoded


def executed_decode(archive, arch, utterances=None):
    """`decode` on executed PTX. Returns its result and the kernel name of each launch."""
    from gpu_proof.emulator import executed

    with triton_on_the_cpu(), executed(arch=arch) as launches:
        decoded = decode(archive, "triton", utterances)
    return decoded, [launch.name for launch in launches]


def executed_small_search(arch, seed, **settings):
    """Search the toy model on executed PTX and return [(tokens, score)] of the best hypotheses."""
    from toy_model import ToyModel, config, memory

    from gpu_proof.emulator import executed

    with triton_on_the_cpu(), executed(arch=arch):
        batch = beam_search(
            ToyModel(), memory([seed], [4]), config(**settings), nbest=5, backend="triton", capture=False
        )
    return [(tuple(h.text_tokens), h.score) for h in batch[0]]


def executed_training(archive, arch, steps):
    """`train` on executed PTX. Returns its results and the kernel name of each launch."""
    from gpu_proof.emulator import executed

    with triton_on_the_cpu(), executed(arch=arch) as launches:
        results = train(archive, "triton", steps)
    return *results, [launch.name for launch in launches]


def train(archive, backend, steps):
    """Train a small model on AN4 with a backend of speller_unroll.

    A third of the tokens are sampled; the loss includes CTC and guided attention; the cells have dropout.

    Returns:
        The loss of each step, and {name: gradient} of the first step.
    """
    config = small_training()
    losses, first_gradients = [], {}
    with tempfile.TemporaryDirectory() as folder, unroll_backend(backend):
        trainer = make_trainer(archive, Path(folder, "run"), config)
        while trainer.progress.step < steps:
            for batch in trainer._rest_of_epoch():
                losses.append(float(trainer.train_step(batch)["loss"]))
                if not first_gradients:
                    first_gradients = {name: x.grad.clone() for name, x in trainer.model.named_parameters()}
                if trainer.progress.step == steps:
                    break
    return losses, first_gradients


def small_training():
    """Preset an4 with small layers, a constant learning rate and batches of two short utterances."""
    config = load_config("an4")
    listener = replace(
        config.model.listener, conv_channels=(16,), conv_kernels=(5,), conv_strides=(2,), lstm_size=12, top_layers=1,
        pyramids=1,
    )  # fmt: skip
    speller_config = replace(config.model.speller, key_size=18, value_size=20, embedding_size=16, lstm_sizes=(24, 18))
    training = replace(
        config.training, learning_rate=1e-4, warmup_steps=0, schedule="constant", precision="fp32", ema_decay=0.0,
        teacher_forcing=(TeacherForcingStage(start=0.0, end=200.0, first=0.7, last=0.7),),
    )  # fmt: skip
    return replace(
        config,
        data=replace(config.data, utterances_per_batch=2, max_seconds=1.5),
        augment=replace(config.augment, splice=0.0),
        model=replace(config.model, listener=listener, speller=speller_config, ctc_layer=2, inner_ctc_layer=-1),
        training=training,
    )


@contextlib.contextmanager
def unroll_backend(backend):
    """Make the speller use a given backend of speller_unroll inside the block."""
    op = speller.speller_unroll

    def with_backend(*args, **options):
        return op(*args, **options | {"backend": backend})

    with mock.patch.object(speller, "speller_unroll", with_backend):
        yield
