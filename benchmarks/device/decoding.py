"""Decode the dev set of AN4 with the released model: on the CPU, and on the GPU with and without CUDA graphs."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.device import edit_distance
from benchmarks.device.an4 import WITHOUT_DATA, data_of
from benchmarks.device.parts import Options
from benchmarks.device.record import NEEDS_CUDA, Record
from benchmarks.device.timing import exact_float32, seconds_of_call
from las_fast.checkpoint import Loaded, load_model
from las_fast.config import DecodingConfig
from las_fast.data.dataset import SpeechDataset, load_dataset
from las_fast.data.layouts import open_corpus
from las_fast.ops import NgramModel, table_model
from las_fast.output.metrics import score
from las_fast.search.beam import beam_search
from las_fast.search.dataset import batches_to_decode, listen
from las_fast.text import SOS

MODEL = "an4"
BF16_SHARE = 0.1  # of the texts that may differ in bfloat16
CPU_BEAM = 16  # the CPU takes too long for wider beams
BF16 = "CTC, beam 8, bf16"
SETTINGS: dict[str, dict] = {
    "CTC, beam 8": {"ctc_weight": 0.3},
    "attention, beam 8": {},
    "beam 1": {"beam": 1},
    "n-gram": {"ngram_weight": 0.1},
    "coverage": {"coverage_weight": 0.1},
    "CTC, beam 130": {"ctc_weight": 0.3, "beam": 130},
    BF16: {"ctc_weight": 0.3, "precision": "bf16"},
}


class Way(NamedTuple):
    """A device and how beam_search runs there."""

    name: str
    device: str
    capture: bool | None  # as in beam_search


def run(options: Options, record: Record) -> None:
    edit_distance.provide()
    with tempfile.TemporaryDirectory() as folder, data_of(options, Path(folder)) as data:
        if data is None:
            return record.skip("decoding of AN4", WITHOUT_DATA)
        models = {device: load_model(MODEL, device) for device in {"cpu", options.device}}
        dev = dev_set(models["cpu"], data, Path(folder))
        names = list(SETTINGS) if not options.quick else [*list(SETTINGS)[:3], BF16]
        for name in record.while_time_remains(names, "decoding of AN4"):
            with record.attempt(f"decoding of AN4, {name}"):
                compare(name, models, dev, options.device, record)
        with record.attempt("decoding of AN4 with tf32 LSTMs"):
            compare_tf32(models, dev, options.device, record)


def dev_set(loaded: Loaded, data: Path, folder: Path) -> SpeechDataset:
    settings = dataclasses.replace(loaded.config.data, cache=str(folder / "cache"))
    return load_dataset(
        open_corpus(data), ("dev",), features=loaded.config.features, data=settings, need_text=True, progress=False
    )


def compare(name: str, models: dict[str, Loaded], dev: SpeechDataset, device: str, record: Record) -> None:
    """Decode in each way; record the speed, the CER, and how many texts differ from the first way's."""
    ways = [Way("CPU", "cpu", None), Way("step by step", device, False)]
    if SETTINGS[name].get("beam", 1) > CPU_BEAM:
        ways = ways[1:]
    if device == "cuda":
        ways.append(Way("captured", device, True))
    else:
        record.skip(f"decoding of AN4, {name}", NEEDS_CUDA, path="captured")
    expected: list[str] = []
    low = SETTINGS[name].get("precision") == "bf16"
    dtype = "bfloat16" if low else "float32"
    for way in ways:
        labels = {"shape": f"{len(dev)} utterances", "dtype": dtype, "path": way.name}
        texts: list[str] = []
        with record.attempt(f"decoding of AN4, {name}", **labels), exact_float32():
            seconds = timed(way, name, models, dev, texts)
            record.row(f"decoding of AN4, {name}: real-time factor", float(dev.seconds.sum()) / seconds, **labels)
            record.row(f"decoding of AN4, {name}: CER", score(dev.texts, texts).cer, "%", **labels)
            expected = expected or texts
            if way != ways[0]:
                different = sum(map(str.__ne__, texts, expected))
                what = f"decoding of AN4, {name}: texts that differ from {ways[0].name}"
                record.check(what, different, BF16_SHARE * len(dev) if low else 0, **labels)


def compare_tf32(models: dict[str, Loaded], dev: SpeechDataset, device: str, record: Record) -> None:
    """Record how many texts change with cuDNN's default precision, tf32, which users get."""
    name, way = "CTC, beam 8", Way("step by step", device, False)
    exact: list[str] = []
    default: list[str] = []
    with exact_float32():
        decode(way, name, models, dev, exact)
    decode(way, name, models, dev, default)
    different = sum(map(str.__ne__, default, exact))
    record.row(f"decoding of AN4, {name}: texts that differ with tf32 LSTMs", different, shape=f"of {len(dev)}")


def timed(way: Way, name: str, models: dict[str, Loaded], dev: SpeechDataset, texts: list[str]) -> float:
    """Decode into `texts`, on CUDA after a warm-up; return the seconds."""
    if way.device == "cuda":
        decode(way, name, models, dev, [])
    return seconds_of_call(lambda: decode(way, name, models, dev, texts), way.device)


def decode(way: Way, name: str, models: dict[str, Loaded], dev: SpeechDataset, texts: list[str]) -> None:
    """Put the text of each utterance into `texts`."""
    model, vocabulary = models[way.device].model, models[way.device].vocabulary
    settings = {"precision": "fp32", "ctc_weight": 0.0, **SETTINGS[name]}
    config: DecodingConfig = dataclasses.replace(models[way.device].config.decoding, **settings)
    bigrams = random_bigrams(len(vocabulary), way.device)
    text_of = {}
    for batch in batches_to_decode(dev, vocabulary, config):
        memory = listen(model, batch.to(way.device), config)
        hypotheses = beam_search(model, memory, config, ngram=bigrams, capture=way.capture)
        texts_of_batch = [vocabulary.decode(best[0].text_tokens) for best in hypotheses]
        text_of.update(zip(batch.indices.tolist(), texts_of_batch, strict=True))
    texts[:] = [text_of[i] for i in range(len(dev))]


@functools.cache  # one model: a graph is replayed only with the model that it was captured with
def random_bigrams(V: int, device: str) -> NgramModel:
    """Return a model of random log-probabilities for each pair of tokens."""
    table = torch.log_softmax(torch.randn(V, V, generator=torch.Generator().manual_seed(0)), -1)
    return table_model(table, SOS).to(device)
