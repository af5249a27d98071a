"""Measure the CER of checkpoints on a split as it is, and with noise, babble, a telephone, a room and silence.

    python -m benchmarks.robustness --checkpoint RUN|NAME [...] --data ROOT [--ways greedy best] [--record]

The recipe changes the waveform, before everything that las_fast does to it. Its random numbers are seeded by the
condition and the id of the utterance, so checkpoints with the same sample rate get the same audio. SNR is
the ratio of the mean power of the speech, pauses excluded, to that of the noise.

    20, 10, 5 dB   noise whose power falls with frequency to the power 0 (white) to 2 (brown), drawn per utterance
    babble 10 dB   six other utterances of the split at once
    telephone      300 to 3400 Hz, 16 bits at 8 kHz
    reverberant    exponentially decaying noise as the impulse response: T60 0.3 to 0.6 s, direct sound 3 dB below to
                   3 dB above the rest
    4 s of zeros   before and after

"greedy" is attention alone; "best" is the checkpoint's own settings, with its CTC weight and language model. --lm gives
a checkpoint without a language model weight the default one. The tables have several checkpoints side by side, and the
relative change of the CER from the first to the last. Recordings are read and changed once for all checkpoints of one
sample rate.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import soxr
import torch

from benchmarks.rows import CONTEXT, RESULTS, append_rows, context
from benchmarks.side_by_side import labels, load_checkpoints, score_table
from benchmarks.silence import pad
from benchmarks.splits import add_checkpoints_option, parts
from las_fast.checkpoint import Loaded
from las_fast.cli import run
from las_fast.config import DecodingConfig, FeatureConfig
from las_fast.data.audio import load_audio
from las_fast.data.corpus import Utterance
from las_fast.data.features import compute_features, frame_sizes, speech_features
from las_fast.data.layouts import open_corpus
from las_fast.data.silence import band_energy, find_speech
from las_fast.errors import InputError
from las_fast.ops import NgramModel
from las_fast.output.metrics import score
from las_fast.progress import track
from las_fast.search.dataset import Utterances, decode_dataset
from las_fast.search.ngram import load_ngram_model, with_default_weight

FILE = RESULTS / "robustness.csv"
COLUMNS = (*CONTEXT, "checkpoint", "split", "part", "condition", "way", "utterances", "cer")
FLAT_BELOW = 20.0  # Hz below which coloured noise has one level
TALKERS = 6  # of babble
TELEPHONE, TELEPHONE_RATE = (300.0, 3400.0), 8000  # Hz
EDGE = 50.0  # Hz over which a band-pass filter rises
T60, DIRECT_DB = (0.3, 0.6), (-3.0, 3.0)  # seconds; level of the direct sound over the reverberation
SILENCE = 4.0  # seconds


@dataclass(frozen=True)
class Recordings:
    """The recordings of a split: samples (N,) float32 and the mean power of their speech."""

    rate: int  # Hz
    samples: list[np.ndarray]
    powers: list[float]


Cers = dict[tuple[str, str, str, str], float]  # percent; by label, condition, way and part
Change = Callable[[Recordings, int, np.random.Generator], np.ndarray]  # of utterance i; returns samples (N,) float32


def speech_power(samples: np.ndarray, rate: int) -> float:
    """Return the mean power of the speech in samples (N,), pauses excluded; of all samples if there is no speech."""
    config = FeatureConfig(sample_rate=rate)
    window, shift = frame_sizes(config)
    speech = find_speech(band_energy(compute_features([samples], config)[0], config), config)
    padded = np.pad(samples, (0, max(0, window - len(samples))))
    powers = torch.from_numpy(padded).square().unfold(0, window, shift).mean(1)
    return float(powers[speech].mean() if speech.any() else powers.mean())


def coloured_noise(count: int, rate: int, exponent: float, generator: np.random.Generator) -> np.ndarray:
    """Return noise (count,) of mean power 1 whose power density falls with frequency ** exponent above FLAT_BELOW."""
    spectrum = np.fft.rfft(generator.standard_normal(count))
    frequencies = np.maximum(np.fft.rfftfreq(count, 1 / rate), FLAT_BELOW)
    noise = np.fft.irfft(spectrum * frequencies ** (-exponent / 2), count)
    return noise / np.sqrt(np.mean(noise**2))


def mix(samples: np.ndarray, power: float, noise: np.ndarray, snr: float) -> np.ndarray:
    """Add noise (N,) to samples (N,) whose speech has this power, at `snr` dB."""
    gain = np.sqrt(power / np.mean(noise**2)) * 10 ** (-snr / 20)
    return (samples + gain * noise).astype(np.float32)


def add_coloured_noise(recordings: Recordings, i: int, generator: np.random.Generator, *, snr: float) -> np.ndarray:
    exponent = generator.uniform(0, 2)
    noise = coloured_noise(len(recordings.samples[i]), recordings.rate, exponent, generator)
    return mix(recordings.samples[i], recordings.powers[i], noise, snr)


def add_babble(recordings: Recordings, i: int, generator: np.random.Generator, *, snr: float) -> np.ndarray:
    """Add TALKERS other recordings at equal speech power, each repeated from a random point on."""
    count = len(recordings.samples[i])
    babble = np.zeros(count)
    others = [k for k in range(len(recordings.samples)) if k != i and recordings.powers[k] > 0]
    for k in generator.choice(others, TALKERS, replace=len(others) < TALKERS):
        other = recordings.samples[k]
        shifted = np.roll(other, -int(generator.integers(len(other))))
        babble += np.resize(shifted, count) / np.sqrt(recordings.powers[k])
    return mix(recordings.samples[i], recordings.powers[i], babble, snr)


def band_pass(samples: np.ndarray, rate: int, low: float, high: float) -> np.ndarray:
    """Remove what is below `low` and above `high` Hz from samples (N,), with edges EDGE wide."""
    frequencies = np.fft.rfftfreq(len(samples), 1 / rate)
    rise = np.clip((frequencies - low) / EDGE + 1, 0, 1) * np.clip((high - frequencies) / EDGE + 1, 0, 1)
    return np.fft.irfft(np.fft.rfft(samples) * np.sin(np.pi / 2 * rise) ** 2, len(samples)).astype(np.float32)


def telephone(recordings: Recordings, i: int, generator: np.random.Generator) -> np.ndarray:
    narrow = soxr.resample(recordings.samples[i], recordings.rate, TELEPHONE_RATE)
    narrow = band_pass(narrow, TELEPHONE_RATE, *TELEPHONE) if len(narrow) else np.zeros(1, np.float32)
    narrow = np.round(narrow * 32768) / 32768
    return soxr.resample(narrow.astype(np.float32), TELEPHONE_RATE, recordings.rate)


def impulse_response(rate: int, t60: float, direct_db: float, generator: np.random.Generator) -> np.ndarray:
    """Return a synthetic room impulse response: 1, then decaying noise with an energy `direct_db` dB below 1."""
    time = np.arange(1, int(t60 * rate)) / rate
    tail = generator.standard_normal(len(time)) * 10 ** (-3 * time / t60)  # 60 dB after t60
    tail *= 10 ** (-direct_db / 20) / np.sqrt(np.sum(tail**2))
    return np.concatenate([[1.0], tail])


def convolve(samples: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Convolve samples (N,) with an impulse response, cut to N samples."""
    size = len(samples) + len(response)
    product = np.fft.rfft(samples, size) * np.fft.rfft(response, size)
    return np.fft.irfft(product, size)[: len(samples)].astype(np.float32)


def reverberate(recordings: Recordings, i: int, generator: np.random.Generator) -> np.ndarray:
    t60, direct_db = generator.uniform(*T60), generator.uniform(*DIRECT_DB)
    return convolve(recordings.samples[i], impulse_response(recordings.rate, t60, direct_db, generator))


def surround_with_zeros(recordings: Recordings, i: int, generator: np.random.Generator) -> np.ndarray:
    return pad(recordings.samples[i], recordings.rate, SILENCE, None, 0)


CONDITIONS: dict[str, Change] = {
    "clean": lambda recordings, i, generator: recordings.samples[i],
    "20 dB": partial(add_coloured_noise, snr=20.0),
    "10 dB": partial(add_coloured_noise, snr=10.0),
    "5 dB": partial(add_coloured_noise, snr=5.0),
    "babble 10 dB": partial(add_babble, snr=10.0),
    "telephone": telephone,
    "reverberant": reverberate,
    "4 s of zeros": surround_with_zeros,
}


def changed(recordings: Recordings, utterances: list[Utterance], i: int, condition: str) -> np.ndarray:
    """Return the samples (N,) float32 of utterance i under a condition; the same for each position of i in the list."""
    generator = np.random.default_rng(zlib.crc32(f"{condition} {utterances[i].id}".encode()))
    return CONDITIONS[condition](recordings, i, generator)


def open_utterances(options: argparse.Namespace) -> list[Utterance]:
    """List the utterances of the split, or a random part of them, in the order of the split.

    Raises:
        InputError: the corpus has no recordings, an utterance is unusable or has no transcript, or there are too few.
    """
    corpus = open_corpus(options.data)
    if corpus.kind != "audio":
        raise InputError(f"{corpus.root} has features, and the recipe changes recordings; give a corpus of recordings")
    utterances = [u for name in corpus.choose(options.split) for u in corpus.utterances(name)]
    for u in utterances:
        if u.problem or not isinstance(u.transcript, str) or not u.transcript.strip():
            raise InputError(u.problem or f"{u.path} has no transcript; leave it out of the split")
    if len(utterances) < 2:
        raise InputError(
            f"--split {options.split} has {len(utterances)} utterances; babble needs others: give 2 or more"
        )
    if options.limit is not None and not 2 <= options.limit <= len(utterances):
        raise InputError(f"--limit must be 2 to {len(utterances)}, the size of {options.split}; got {options.limit}")
    drawn = np.random.default_rng(options.seed).permutation(len(utterances))[: options.limit]
    return [utterances[i] for i in sorted(drawn)]


def load_recordings(utterances: list[Utterance], rate: int) -> Recordings:
    samples = [
        load_audio(u.path, rate, start=u.start, seconds=u.seconds if u.is_part else None, strict=True)
        for u in track(utterances, "reading", "utterances")
    ]
    return Recordings(rate, samples, [speech_power(one, rate) for one in samples])


def input_settings(loaded: Loaded) -> tuple:
    """Return everything that the model's inputs depend on besides the samples."""
    statistics = loaded.statistics
    arrays = (statistics.mean, statistics.std) if statistics else ()
    return loaded.config.features, *(array.numpy().tobytes() for array in arrays)


def make_frames(loaded: Loaded, samples: np.ndarray) -> torch.Tensor:
    """Return the frames (T, F) of samples (N,), before normalisation and deltas."""
    ((frames, _),) = speech_features([samples], loaded.config.features)
    return frames


def make_datasets(
    checkpoints: Sequence[Loaded], recordings: Recordings, utterances: list[Utterance], condition: str
) -> list[Utterances]:
    """Return each model's inputs for every utterance under a condition; models with equal inputs share them.

    The checkpoints have the sample rate of the recordings.
    """
    kinds = {input_settings(loaded): loaded for loaded in checkpoints}
    frames: dict[tuple, list[torch.Tensor]] = {kind: [] for kind in kinds}
    seconds = []
    for i in track(range(len(utterances)), condition, "utterances"):
        samples = changed(recordings, utterances, i, condition)
        seconds.append(len(samples) / recordings.rate)
        for kind, loaded in kinds.items():
            frames[kind].append(make_frames(loaded, samples))
    assert all(len(some) == len(utterances) and all(bool(x.isfinite().all()) for x in some) for some in frames.values())
    ids = [u.id for u in utterances]
    datasets = {
        kind: Utterances(some, ids, seconds, kinds[kind].config.features, kinds[kind].statistics)
        for kind, some in frames.items()
    }
    return [datasets[input_settings(loaded)] for loaded in checkpoints]


@dataclass(frozen=True)
class Entry:
    """A checkpoint, and how it is decoded."""

    name: str  # as it was given
    label: str  # in tables
    loaded: Loaded
    ways: dict[str, tuple[DecodingConfig, NgramModel | None]]

    @property
    def rate(self) -> int:
        """Sample rate in Hz."""
        return self.loaded.config.features.sample_rate


def prepare(options: argparse.Namespace) -> list[Entry]:
    """Load the checkpoints and their language models."""
    names, entries = options.checkpoint, []
    for name, label, loaded in zip(names, labels(names), load_checkpoints(names), strict=True):
        ways = {}
        base = with_default_weight(loaded, options.lm)
        for way, decoding in (("greedy", base.greedy()), ("best", base)):
            if way in options.ways:
                lm = options.lm if decoding.ngram_weight else None
                ways[way] = (decoding, load_ngram_model(lm, decoding, loaded, "cpu"))
        entries.append(Entry(name, label, loaded, ways))
    return entries


@torch.inference_mode()
def measure_rate(entries: list[Entry], utterances: list[Utterance], groups: dict[str, list[int]],
                 conditions: list[str], *, several: bool) -> Cers:  # fmt: skip
    """Return the CERs of checkpoints of one sample rate.

    Args:
        groups:     utterance indices of each part.
        conditions: to measure.
        several:    whether there are other checkpoints, so that the lines printed need names.
    """
    recordings, cers = load_recordings(utterances, entries[0].rate), {}
    texts = [u.transcript for u in utterances]
    for condition in conditions:
        datasets = make_datasets([entry.loaded for entry in entries], recordings, utterances, condition)
        for entry, data in zip(entries, datasets, strict=True):
            for way, (decoding, ngram) in entry.ways.items():
                result = measure(entry.loaded, data, texts, groups, decoding, ngram)
                cers |= {(entry.label, condition, way, part): cer for part, cer in result.items()}
                name = f", {entry.label}" if several else ""
                print(f"{condition}, {way}{name}: CER {result['all']:.2f}%", flush=True)
    return cers


def measure(loaded: Loaded, data: Utterances, texts: list[str], groups: dict[str, list[int]], decoding: DecodingConfig,
            ngram: NgramModel | None) -> dict[str, float]:  # fmt: skip
    """Decode every utterance, and return the CER of each group in percent."""
    hypotheses = decode_dataset(loaded.model, data, loaded.vocabulary, decoding, ngram=ngram, device="cpu")
    assert len(hypotheses) == len(texts) and all(hypotheses)
    decoded = [loaded.vocabulary.decode(best.text_tokens) for best, *_ in hypotheses]
    return {
        part: score([texts[i] for i in members], [decoded[i] for i in members]).cer for part, members in groups.items()
    }


def markdown(cers: Mapping[tuple[str, str, str, str], float], way: str, *, checkpoints: list[str],
             conditions: list[str], names: list[str]) -> str:  # fmt: skip
    """Return a Markdown table of CER, and its multiple of the clean CER, with a line per condition and checkpoint.

    Args:
        cers:  see Cers.
        way:   name of the decoding.
        names: of the parts.
    """
    some = {(name, condition, part): cer for (name, condition, one, part), cer in cers.items() if one == way}
    return score_table(f"CER, %, {way}", some, lambda key: cell(some[key], some.get((key[0], "clean", key[2]))),
                       checkpoints=checkpoints, rows=conditions, parts=names)  # fmt: skip


def cell(cer: float, clean: float | None) -> str:
    """Return a CER, with its multiple of the clean one if that was measured and is above 0."""
    return f"{cer:.2f} (x {cer / clean:.2f})" if clean else f"{cer:.2f}"


def record(cers: Cers, entries: list[Entry], groups: dict[str, list[int]], split: str) -> None:
    """Append a row per CER to FILE, checkpoint by checkpoint."""
    for entry in entries:
        constant = (*context(), entry.name, split)
        rows = [(*constant, part, condition, way, len(groups[part]), f"{cer:.2f}")
                for (label, condition, way, part), cer in cers.items() if label == entry.label]  # fmt: skip
        append_rows(FILE, COLUMNS, rows)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.robustness", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add_checkpoints_option(parser)
    parser.add_argument("--data", required=True, help="corpus of recordings")
    parser.add_argument("--split", default="dev")
    parser.add_argument("--limit", type=int, metavar="N", help="use N random utterances (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of --limit (default: 0)")
    parser.add_argument("--conditions", nargs="+", default=list(CONDITIONS), choices=CONDITIONS, metavar="NAME",
                        help=f"any of {', '.join(map(repr, CONDITIONS))} (default: all)")  # fmt: skip
    parser.add_argument("--ways", nargs="+", default=["greedy"], choices=("greedy", "best"))
    parser.add_argument("--lm", help="language model (default: each checkpoint's, if it has one)")
    parser.add_argument("--by", default="", help="manifest column to divide the split by")
    parser.add_argument("--record", action="store_true", help=f"append the rows to benchmarks/results/{FILE.name}")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    entries = prepare(options)
    utterances = open_utterances(options)
    corpus = open_corpus(options.data)
    groups = parts([u.id for u in utterances], corpus.root, corpus.choose(options.split), options.by)
    conditions = [condition for condition in CONDITIONS if condition in options.conditions]  # clean first
    rates = sorted({entry.rate for entry in entries})
    cers: Cers = {}
    for rate in rates:
        same = [entry for entry in entries if entry.rate == rate]
        cers |= measure_rate(same, utterances, groups, conditions, several=len(entries) > 1)
    print(f"{len(utterances)} utterances of {options.split}")
    if len(rates) > 1:
        print(f"checkpoints with different sample rates, {', '.join(map(str, rates))} Hz, get different noise")
    shape = {"checkpoints": [entry.label for entry in entries], "conditions": conditions, "names": list(groups)}
    print("\n\n".join(markdown(cers, way, **shape) for way in entries[0].ways))
    if options.record:
        record(cers, entries, groups, options.split)


if __name__ == "__main__":
    run(main)
