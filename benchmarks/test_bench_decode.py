"""Benchmark beam search of a batch against the same search in PyTorch alone (plain.py), and decoding a split by stages.

Every utterance takes the same number of steps: <eos> is forbidden before the last step and forced there. The default
shape is that of benchmarks/peers.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.search_paths import Shape, compare_searches
from benchmarks.subprocess_timer import SubprocessTimer, closing_all
from benchmarks.synthetic_speech import frame_counts, write_manifest, write_untrained_checkpoint
from las_fast import checkpoint, decode
from las_fast.data.audio import load_audio
from las_fast.data.batch_plan import sorted_batches
from las_fast.data.features import compute_features
from las_fast.data.normalisation import normalise
from las_fast.search.beam import beam_search
from las_fast.search.dataset import MAX_UTTERANCES_PER_BATCH


def test_beam_search(compare):
    compare_searches(compare, Shape())


CURVES = {
    "batch": [Shape(B=n, steps=32) for n in (1, 2, 4, 8, 16, 32)],
    "beam": [Shape(K=n, steps=32) for n in (1, 2, 4, 8, 16)],
    "frames": [Shape(T=n, steps=32) for n in (50, 100, 200, 400, 800)],
    "vocabulary": [Shape(V=n, steps=32) for n in (31, 500, 5000)],
    "hidden size": [Shape(H=n, steps=32) for n in (128, 256, 512, 1024)],
}
CURVE_PATHS = ("plain", "plain bf16", "las_fast cpp", "las_fast bf16", "las_fast int8")


@pytest.mark.parametrize(("axis", "shape"), [(axis, s) for axis in CURVES for s in CURVES[axis]], ids=str)
def test_beam_search_by_shape(compare, long, axis, shape):
    compare_searches(compare, shape, *CURVE_PATHS, what=f"beam search by {axis}", rounds=3)


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
def test_beam_search_by_threads(compare, long, threads):
    compare_searches(compare, Shape(steps=32), *CURVE_PATHS, what="beam search by threads", rounds=3)


UTTERANCES = 48
STAGES = {"reading": "read", "features": "compute_features", "listener": "listen", "search": "search"}  # methods
WHOLE = "the whole command"


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """A folder with a manifest of synthetic Opus recordings and an untrained checkpoint."""
    folder = tmp_path_factory.mktemp("split")
    write_manifest(folder / "data", "ogg", frame_counts(UTTERANCES))
    write_untrained_checkpoint(folder / "untrained.safetensors")
    return folder


class Pipeline:
    """The stages of las_fast.decode on the synthetic split."""

    def __init__(self, folder: Path):
        self.model, self.config, *_ = checkpoint.load_model(folder / "untrained.safetensors")
        self.files = sorted((folder / "data" / "audio").iterdir())

    def read(self) -> list:
        return [load_audio(file, self.config.features.sample_rate, strict=True) for file in self.files]

    def compute_features(self, waves: list) -> list:
        return [normalise(x, self.config.features) for x in compute_features(waves, self.config.features)]

    def make_batches(self, features: list) -> list:
        options = {"frames_per_batch": self.config.decoding.frames_per_batch}
        order = sorted_batches([len(x) for x in features], utterances_per_batch=MAX_UTTERANCES_PER_BATCH, **options)
        pad = torch.nn.utils.rnn.pad_sequence
        return [(pad([features[i] for i in b], True), torch.tensor([len(features[i]) for i in b])) for b in order]

    @torch.inference_mode()
    def listen(self, batches: list) -> list:
        return [self.model.listen(*batch) for batch in batches]

    def search(self, memories: list) -> list:
        return [beam_search(self.model, memory, self.config.decoding) for memory in memories]


def decode_split(folder: Path) -> None:
    """Run the decode command with an empty feature cache."""
    argv = ["--checkpoint", folder / "untrained.safetensors", "--data", folder / "data", "--split", "dev"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setenv("XDG_CACHE_HOME", str(folder / f"cache-{time.monotonic_ns()}"))
        decode.main([str(word) for word in (*argv, "--out", folder / "out.csv")])


def make_stage(name: str, folder: Path, threads: int) -> Callable[[], object]:
    """Return a function that runs one stage on the output of the stages before it."""
    torch.set_num_threads(threads)
    if name == WHOLE:
        return lambda: decode_split(folder)
    pipeline, inputs = Pipeline(folder), []
    for stage in (pipeline.read, pipeline.compute_features, pipeline.make_batches, pipeline.listen):
        if stage.__name__ == STAGES[name]:
            return lambda: stage(*inputs)
        inputs = [stage(*inputs)]
    return lambda: pipeline.search(*inputs)


def test_decoding_a_split_by_stages(compare, split):
    """Time each stage and the whole command, each in its own process with the memory settings of the command."""
    pipeline, threads = Pipeline(split), torch.get_num_threads()
    seconds = sum(map(len, pipeline.read())) / pipeline.config.features.sample_rate
    stages = {name: SubprocessTimer(make_stage, name, split, threads, tuned=True) for name in (*STAGES, WHOLE)}
    with closing_all(stages):
        compare(
            "decode",
            stages,
            what="decoding a split by stages",
            shape=f"{UTTERANCES} utterances, beam {pipeline.config.decoding.beam}, preset speech13h",
            dtypes=dict.fromkeys(stages, "float32"),
            baseline=WHOLE,
            rounds=3,
            per=seconds * 1e-3,
            unit="ms/s of audio",
        )
