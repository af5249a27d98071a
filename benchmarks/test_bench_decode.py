"""Beam search of a batch, at the shape that benchmarks/peers has, beside the same search in PyTorch alone (plain.py);
and a whole split, by stages.

Every utterance takes the same number of steps: <eos> is barred until the last, where it is forced.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.elsewhere import Elsewhere, each_elsewhere
from benchmarks.made import frame_counts, manifest, untrained
from benchmarks.searches import Shape, timed
from las_fast import checkpoint, decode
from las_fast.data.audio import load_audio
from las_fast.data.batching import sorted_batches
from las_fast.data.dataset import normalise
from las_fast.data.features import compute_features
from las_fast.search.beam import beam_search
from las_fast.search.dataset import UTTERANCES_PER_BATCH


def test_beam_search(compare):
    timed(compare, Shape())


CURVES = {
    "batch": [Shape(B=n, steps=32) for n in (1, 2, 4, 8, 16, 32)],
    "beam": [Shape(K=n, steps=32) for n in (1, 2, 4, 8, 16)],
    "frames": [Shape(T=n, steps=32) for n in (50, 100, 200, 400, 800)],
    "vocabulary": [Shape(V=n, steps=32) for n in (31, 500, 5000)],
    "hidden size": [Shape(H=n, steps=32) for n in (128, 256, 512, 1024)],
}
CURVE = ("plain", "plain bf16", "las_fast cpp", "las_fast bf16", "las_fast int8")


@pytest.mark.parametrize(("axis", "shape"), [(axis, s) for axis in CURVES for s in CURVES[axis]], ids=str)
def test_beam_search_by_shape(compare, long, axis, shape):
    timed(compare, shape, *CURVE, what=f"beam search by {axis}", rounds=3)


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
def test_beam_search_by_threads(compare, long, threads):
    timed(compare, Shape(steps=32), *CURVE, what="beam search by threads", rounds=3)


UTTERANCES = 48
STAGES = {"reading": "waves", "features": "frames", "listener": "memories", "search": "hypotheses"}  # methods of Split
WHOLE = "the whole command"


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """A manifest of made-up Opus recordings, and an untrained checkpoint that spells as many letters as speech has."""
    folder = tmp_path_factory.mktemp("split")
    manifest(folder / "data", "ogg", frame_counts(UTTERANCES))
    untrained(folder / "untrained.safetensors")
    return folder


class Split:
    """That split up to each stage, as las_fast.decode takes it there."""

    def __init__(self, folder: Path):
        self.model, self.config, *_ = checkpoint.load_model(folder / "untrained.safetensors")
        self.files = sorted((folder / "data" / "audio").iterdir())

    def waves(self) -> list:
        return [load_audio(file, self.config.features.sample_rate, whole=True) for file in self.files]

    def frames(self, waves: list) -> list:
        return [normalise(x, self.config.features) for x in compute_features(waves, self.config.features)]

    def batches(self, frames: list) -> list:
        options = {"frames_per_batch": self.config.decoding.frames_per_batch}
        order = sorted_batches([len(x) for x in frames], utterances_per_batch=UTTERANCES_PER_BATCH, **options)
        pad = torch.nn.utils.rnn.pad_sequence
        return [(pad([frames[i] for i in b], True), torch.tensor([len(frames[i]) for i in b])) for b in order]

    @torch.inference_mode()
    def memories(self, batches: list) -> list:
        return [self.model.listen(*batch) for batch in batches]

    def hypotheses(self, memories: list) -> list:
        return [beam_search(self.model, memory, self.config.decoding) for memory in memories]


def command(folder: Path) -> None:
    """Decode the split with an empty cache."""
    words = ["--checkpoint", folder / "untrained.safetensors", "--data", folder / "data", "--split", "dev"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setenv("XDG_CACHE_HOME", str(folder / f"cache-{time.monotonic_ns()}"))
        decode.main([str(word) for word in (*words, "--out", folder / "out.csv")])


def stage_of(name: str, folder: Path, threads: int) -> Callable[[], object]:
    """Return that stage, with what the stages before it give."""
    torch.set_num_threads(threads)
    if name == WHOLE:
        return lambda: command(folder)
    split, given = Split(folder), []
    for step in (split.waves, split.frames, split.batches, split.memories):
        if step.__name__ == STAGES[name]:
            return lambda: step(*given)
        given = [step(*given)]
    return lambda: split.hypotheses(*given)


def test_decoding_a_split_by_stages(compare, split):
    """Each stage, and the command itself, in a process of its own that treats its memory as the command does."""
    here, threads = Split(split), torch.get_num_threads()
    seconds = sum(map(len, here.waves())) / here.config.features.sample_rate
    stages = {name: Elsewhere(stage_of, name, split, threads, tuned=True) for name in (*STAGES, WHOLE)}
    with each_elsewhere(stages):
        compare(
            "decode",
            stages,
            what="decoding a split by stages",
            shape=f"{UTTERANCES} utterances, beam {here.config.decoding.beam}, preset speech13h",
            dtypes=dict.fromkeys(stages, "float32"),
            baseline=WHOLE,
            rounds=3,
            per=seconds * 1e-3,
            unit="ms/s of audio",
        )
