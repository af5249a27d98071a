"""Beam search of a batch, at the shape that benchmarks/peers has, beside the same search in PyTorch alone (plain.py);
and a whole split, by stages.

Every utterance takes the same number of steps: <eos> is barred until the last, where it is forced.
"""

from __future__ import annotations

import contextlib
import io
import time

import pytest
import torch

from benchmarks.made import frame_counts, manifest, untrained
from benchmarks.searches import Shape, timed
from las_fast import checkpoint, decode
from las_fast.data.batching import sorted_batches
from las_fast.data.dataset import normalise
from las_fast.features import compute_features, load_audio
from las_fast.search import UTTERANCES_PER_BATCH, beam_search


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


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """A manifest of made-up Opus recordings, and an untrained checkpoint that spells as many letters as speech has."""
    folder = tmp_path_factory.mktemp("split")
    manifest(folder / "data", "ogg", frame_counts(UTTERANCES))
    untrained(folder / "untrained.safetensors")
    return folder


def test_decoding_a_split_by_stages(compare, split):
    """The stages one after another as las_fast.decode takes them, then the command itself with an empty cache."""
    loaded = checkpoint.load_model(split / "untrained.safetensors")
    features, decoding = loaded.config.features, loaded.config.decoding
    files = sorted((split / "data" / "audio").iterdir())
    waves = [load_audio(file, features.sample_rate, whole=True) for file in files]
    frames = [normalise(x, features) for x in compute_features(waves, features)]
    order = sorted_batches(
        [len(x) for x in frames], frames_per_batch=decoding.frames_per_batch, utterances_per_batch=UTTERANCES_PER_BATCH
    )
    pad = torch.nn.utils.rnn.pad_sequence
    batches = [(pad([frames[i] for i in b], True), torch.tensor([len(frames[i]) for i in b])) for b in order]
    with torch.inference_mode():
        memories = [loaded.model.listen(*batch) for batch in batches]

    @torch.inference_mode()
    def listener():
        return [loaded.model.listen(*batch) for batch in batches]

    def everything():
        words = ["--checkpoint", split / "untrained.safetensors", "--data", split / "data", "--split", "dev"]
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
            patch.setenv("XDG_CACHE_HOME", str(split / f"cache-{time.monotonic_ns()}"))
            decode.main([str(word) for word in (*words, "--out", split / "out.csv")])

    compare(
        "decode",
        {
            "reading": lambda: [load_audio(file, features.sample_rate, whole=True) for file in files],
            "features": lambda: [normalise(x, features) for x in compute_features(waves, features)],
            "listener": listener,
            "search": lambda: [beam_search(loaded.model, memory, decoding) for memory in memories],
            "the whole command": everything,
        },
        what="decoding a split by stages",
        shape=f"{UTTERANCES} utterances, beam {decoding.beam}, preset speech13h",
        dtypes=dict.fromkeys(("reading", "features", "listener", "search", "the whole command"), "float32"),
        baseline="the whole command",
        rounds=3,
        per=sum(map(len, waves)) / features.sample_rate * 1e-3,
        unit="ms/s of audio",
    )
