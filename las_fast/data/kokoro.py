"""python -m las_fast.data.kokoro: synthesise training speech with Kokoro-82M.

    OUT/manifest.tsv          id, path, seconds, speaker, split (train), source (kokoro), transcript
    OUT/audio/000/*.ogg       16 kHz mono Ogg/Opus
    OUT/kokoro.json           what the speech depends on

Each utterance is a random sentence of --text with 4 to 25 words, spoken once, by one of --speakers random blends of two
or three English voices, at a random speed. Sentences with digits, with signs such as & or with letters of other
alphabets are left out: they are spoken, but the transcript would not have them. Write abbreviations such as Mr. as
words, because the transcript has the letters of the text.

Run the same command again to continue after an interruption, or a larger --hours to add speech. The same seed, texts
and model give the same speech on the same machine, for any number of processes.

las_fast/data/README.md has the commands that fetch the model and the voices.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import time
import unicodedata
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from las_fast.arguments import as_folder, as_path
from las_fast.data.kokoro_model import Kokoro, Speaker, load_packages, make_speakers, read_voices
from las_fast.data.kokoro_workers import record_all
from las_fast.data.overlap import COMMON_WORDS, Excluded
from las_fast.data.texts import map_text, read_excluded, read_texts
from las_fast.errors import InputError
from las_fast.files import lock_folder, make_folder, write_atomically, write_text_atomically
from las_fast.options import Parser
from las_fast.progress import ProgressBar
from las_fast.text import CHARACTERS, normalise_text

VERSION = 2  # of the recipe below; a change that alters the speech of a seed raises it
SAMPLE_RATE = 16000
MIN_WORDS, MAX_WORDS = 4, 25
MAX_CHARACTERS = 250  # of a sentence
SIGNS = frozenset("&%@#*/\\^_§¶")  # read aloud, unlike other punctuation
SYMBOLS = ("Sc", "Sm", "So", "Nl")  # read aloud: currencies, mathematics, other symbols, Roman numerals
SPEEDS = (0.85, 1.2)
SILENCES = (0.05, 0.4)  # seconds before and after the speech
NOISE = (-75.0, -50.0)  # dB relative to full scale
PEAK = 0.5  # of full scale: the codec may exceed it
QUIET = 0.01  # of the peak: where the speech begins and ends
MIN_PEAK = 1e-3  # of what the synthesiser returns; less counts as no sound
MAX_SILENT = 50  # sentences in a row without sound
MAX_JOBS = 256
COLUMNS = ("id", "path", "seconds", "speaker", "split", "source", "transcript")


@dataclass(frozen=True)
class PlannedUtterance:
    """One recording to synthesise."""

    number: int  # seeds speaker, speed, silences and noise
    text: str  # as the synthesiser gets it
    transcript: str

    @property
    def name(self) -> str:
        return f"kokoro-{self.number:06d}"

    @property
    def path(self) -> str:
        return f"audio/{self.number // 1000:03d}/{self.name}.ogg"


class Synthesiser(Protocol):
    """What `generate` needs of Kokoro."""

    sample_rate: int

    def speak(self, text: str, speaker: Speaker, *, speed: float) -> np.ndarray: ...


# ---------------------------------------------------------------------------------------------------------------- plan


def plan(texts: list[str], excluded: Excluded | None, seed: int) -> Iterator[PlannedUtterance]:
    """Yield the utterances in random order; no two have the same transcript."""
    seen: set[str] = set()
    numbers = itertools.count()
    for i in np.random.default_rng([seed, 1]).permutation(len(texts)):
        transcript = transcript_of(texts[i])
        if transcript is None or transcript in seen or (excluded and excluded.overlaps(transcript)):
            continue
        seen.add(transcript)
        text = texts[i].strip()
        yield PlannedUtterance(next(numbers), text.lower() if text.isupper() else text, transcript)


def transcript_of(text: str) -> str | None:
    """Return the transcript of a sentence; None if it is not suitable."""
    if len(text) > MAX_CHARACTERS or any(map(is_lost, text)):
        return None
    transcript = " ".join((map_text(text, CHARACTERS) or "").split())
    return transcript if MIN_WORDS <= len(transcript.split()) <= MAX_WORDS else None


@cache
def is_lost(character: str) -> bool:
    """Return whether a character is read aloud, but not in the transcript, such as & or a Greek letter."""
    if character in SIGNS or unicodedata.category(character) in SYMBOLS:
        return True
    return character.isalpha() and not normalise_text(character, CHARACTERS)


# ------------------------------------------------------------------------------------------------------------- speech


@dataclass(frozen=True)
class Studio:
    """Everything that the speech of an utterance depends on."""

    synthesiser: Callable[[], Synthesiser]  # opens one; called once per process
    speakers: tuple[Speaker, ...]
    seed: int
    name: str = "the synthesiser"  # in errors

    def speaker_of(self, utterance: PlannedUtterance) -> Speaker:
        rng = np.random.default_rng([self.seed, 2, utterance.number])
        return self.speakers[int(rng.integers(len(self.speakers)))]

    def record(self, synthesiser: Synthesiser, utterance: PlannedUtterance) -> np.ndarray:
        """Return (N,) float32 samples at 16 kHz; empty if the synthesiser returns no sound."""
        rng = np.random.default_rng([self.seed, 3, utterance.number])
        speaker, speed = self.speaker_of(utterance), float(rng.uniform(*SPEEDS))
        wave = synthesiser.speak(utterance.text, speaker, speed=speed)
        return finish(wave, synthesiser.sample_rate, rng)


def finish(wave: np.ndarray, rate: int, rng: np.random.Generator) -> np.ndarray:
    """Resample to 16 kHz, set the peak, and put random silence and faint noise around the speech."""
    import soxr

    peak = float(np.abs(wave).max(initial=0.0))
    if not MIN_PEAK <= peak < np.inf:
        return np.zeros(0, np.float32)
    loud = np.flatnonzero(np.abs(wave) > QUIET * peak)
    wave = soxr.resample(wave[loud[0] : loud[-1] + 1], rate, SAMPLE_RATE)
    before, after = (int(SAMPLE_RATE * seconds) for seconds in rng.uniform(*SILENCES, size=2))
    wave = np.pad(wave * (PEAK / peak), (before, after))
    noise = 10 ** (rng.uniform(*NOISE) / 20)
    return (wave + noise * rng.standard_normal(len(wave))).astype(np.float32)


# ------------------------------------------------------------------------------------------------------------- corpus


def generate(
    out: Path,
    *,
    texts: list[str],
    studio: Studio,
    hours: float,
    excluded: Excluded | None = None,
    jobs: int = 1,
    model: str = "",
    show: bool = True,
) -> tuple[int, float]:
    """Write the corpus into the folder `out`, or continue it; return the number of utterances and their seconds.

    Args:
        texts:    sentences; those that are not suitable are left out.
        hours:    speech in all, with what the folder has already.
        excluded: sentences that no utterance may overlap with.
        jobs:     processes.
        model:    identifies the model; a folder is only continued with the same one.
        show:     whether to show progress.

    Raises:
        InputError: the folder has something else, or speech of other settings, or another process writes into it; the
            synthesiser returns only silence; the texts do not suffice.
    """
    total = 3600 * hours
    with lock_folder(out, "synthesis"):
        _check_folder(out, settings_of(texts, excluded, studio, model))
        count, seconds = _continue(out, plan(texts, excluded, studio.seed), studio, total, jobs, show)
        _check_amount(out, len(texts), count, seconds, total)
    return count, seconds


def _continue(
    out: Path, planned: Iterator[PlannedUtterance], studio: Studio, total: float, jobs: int, show: bool
) -> tuple[int, float]:
    """Add speech to the folder until it has `total` seconds; return the number of utterances and their seconds."""
    rows = read_rows(out / "manifest.tsv")
    count, seconds = len(rows), sum(duration for _, duration in rows)
    utterances = itertools.islice(planned, rows[-1][0] + 1 if rows else 0, None)
    with ProgressBar(total / 60, "synthesising", "minutes", done=min(seconds, total) / 60, show=show) as bar:
        began, before = time.monotonic(), seconds
        recordings = _record_into(out, utterances if seconds < total else iter(()), studio, jobs)
        with contextlib.closing(recordings):
            for duration in recordings:
                count, seconds = count + 1, seconds + duration
                bar.note(f"RTFx {(seconds - before) / (time.monotonic() - began):.2f}")
                bar.update(duration / 60)
                if seconds >= total:
                    break
    return count, seconds


def _record_into(
    out: Path, utterances: Iterator[PlannedUtterance], studio: Studio, jobs: int
) -> Generator[float, None, None]:
    """Write the recording of each utterance, then its row in the manifest; yield its seconds.

    Utterances without sound are left out; raise InputError if MAX_SILENT in a row have none.
    """
    recordings = record_all(utterances, studio, jobs)
    silent = 0
    with contextlib.closing(recordings), (out / "manifest.tsv").open("ab", buffering=0) as manifest:
        for utterance, wave in recordings:
            silent = 0 if len(wave) else silent + 1
            if silent == MAX_SILENT:
                raise InputError(f"{studio.name} returned silence instead of speech for {silent} sentences in a row, "
                                 f"the last of them {utterance.text[:40]!r}; give another model, or text that it can "
                                 "speak")  # fmt: skip
            if silent:
                continue
            seconds = round(len(wave) / SAMPLE_RATE, 3)
            _write_audio(out / utterance.path, wave)
            manifest.write(row_of(utterance, seconds, studio.speaker_of(utterance)).encode())
            yield seconds


def _check_amount(out: Path, sentences: int, count: int, seconds: float, total: float) -> None:
    """Raise InputError if the texts did not suffice."""
    if not count:
        raise InputError(f"none of the {sentences} sentences can be used: they need {MIN_WORDS} to {MAX_WORDS} words, "
                         "no digits or signs, no overlap with --exclude, and a sound; give other text and a new "
                         "folder")  # fmt: skip
    if seconds < total:
        raise InputError(f"the text ran out: {out} has {seconds / 3600:.2f} of the {total / 3600:g} hours; for "
                         f"more, give more text and a new folder")  # fmt: skip


def _write_audio(path: Path, wave: np.ndarray) -> None:
    import soundfile

    make_folder(path.parent, "--out")
    write_atomically(path, lambda part: soundfile.write(part, wave, SAMPLE_RATE, format="OGG", subtype="OPUS"))


def row_of(utterance: PlannedUtterance, seconds: float, speaker: Speaker) -> str:
    """Return the line of an utterance in the manifest."""
    values = (utterance.name, utterance.path, f"{seconds:.3f}", speaker.name, "train", "kokoro", utterance.transcript)
    return "\t".join(values) + "\n"


def read_rows(path: Path) -> list[tuple[int, float]]:
    """Return the number and the seconds of each utterance of the manifest, and create it if it is missing.

    A last line without its end, which a killed process may leave, is removed.

    Raises:
        InputError: a line is damaged.
    """
    data = path.read_bytes() if path.exists() else b""
    whole = data[: data.rfind(b"\n") + 1] or ("\t".join(COLUMNS) + "\n").encode()
    if whole != data:
        write_atomically(path, lambda part: part.write_bytes(whole))
    rows = []
    for number, line in enumerate(whole.decode("utf-8", "replace").splitlines()[1:], 2):
        try:
            name, _, seconds, *rest = line.split("\t")
            rows.append((int(name.removeprefix("kokoro-")), float(seconds)))
        except ValueError:
            raise InputError(f"{path}: line {number} is damaged; restore it, or give --out a new folder") from None
    return rows


def settings_of(texts: list[str], excluded: Excluded | None, studio: Studio, model: str) -> dict[str, Any]:
    """Return everything that the corpus depends on, for JSON; equal settings mean equal utterances."""
    blends = json.dumps([speaker.blend for speaker in studio.speakers])
    return {
        "version": VERSION,
        "seed": studio.seed,
        "text": _checksum(texts),
        "excluded text": _checksum(sorted(excluded.sentences)) if excluded else None,
        "speakers": f"{len(studio.speakers)} ({_checksum([blends])})",
        "model": model,
    }


def _checksum(lines: Iterable[str]) -> str:
    value = 0
    for line in lines:
        value = zlib.crc32(line.encode("utf-8", "surrogatepass") + b"\n", value)
    return f"{value:08x}"


def _check_folder(out: Path, settings: dict[str, Any]) -> None:
    """Begin an empty folder, or check that it was begun with these settings; raise InputError if not."""
    path = out / "kokoro.json"
    if not path.is_file():
        if any(not entry.name.startswith(".") for entry in out.iterdir()):
            raise InputError(f"{out} contains something other than speech of Kokoro; give --out a new folder")
        write_text_atomically(path, json.dumps(settings, indent=1) + "\n")
        return
    try:
        stored = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise InputError(f"{path} is damaged; give --out a new folder") from None
    if changed := [name for name, value in settings.items() if stored.get(name) != value]:
        raise InputError(f"{out} was begun with another {' and '.join(changed)}; give what it was begun with, or "
                         "--out a new folder")  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ command


def parser() -> Parser:
    parser = Parser(prog="python -m las_fast.data.kokoro", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--text", required=True, type=as_path, nargs="+", metavar="TEXT",
                        help="texts, in every layout that las_fast.lm reads")  # fmt: skip
    parser.add_argument("--hours", required=True, type=float, help="hours of speech in the folder at the end")
    parser.add_argument("--out", required=True, type=as_folder, help="folder for the corpus")
    parser.add_argument("--model", type=as_path, default=Path("kokoro/model.onnx"), metavar="ONNX",
                        help="the model (default: kokoro/model.onnx)")  # fmt: skip
    parser.add_argument("--voices", type=as_path, default=Path("kokoro/voices"), metavar="FOLDER",
                        help="folder of the voices (default: kokoro/voices)")  # fmt: skip
    parser.add_argument(
        "--exclude", type=as_path, nargs="+", default=[], metavar="MANIFEST",
        help=f"leave out sentences of the dev split, and those with {COMMON_WORDS} words in a row in common with them",
    )  # fmt: skip
    parser.add_argument(
        "--exclude-split", help="split of each corpus of --exclude (default: the one that its path names, or dev)"
    )
    parser.add_argument("--speakers", type=int, default=400, help="number of speakers (default: 400)")
    parser.add_argument("--seed", type=int, default=1, help="of sentences, speakers and speeds (default: 1)")
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with one thread (default: 1)")
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Raise InputError for options that are out of range."""
    if not 0 < options.hours <= 10000:
        raise InputError(f"--hours must be more than 0 and at most 10000; got {options.hours:g}")
    for name, least, most in (("speakers", 1, 100_000), ("jobs", 1, MAX_JOBS), ("seed", 0, 2**63 - 1)):
        value = getattr(options, name)
        if not least <= value <= most:
            raise InputError(f"--{name} must be from {least} to {most}; got {value}")


def main(argv: list[str] | None = None) -> None:
    """Run the command; see --help."""
    options = parser().parse_args(argv)
    check_options(options)
    load_packages()
    voices = read_voices(options.voices)
    synthesiser = partial(Kokoro, options.model, options.voices)
    synthesiser()  # a model that does not load is reported before the texts are read
    speakers = make_speakers(list(voices), options.speakers, options.seed)
    count, seconds = generate(
        options.out,
        texts=[text for source in options.text for text in read_texts(source, option="--text CORPUS/SPLIT")],
        studio=Studio(synthesiser, tuple(speakers), options.seed, str(options.model)),
        hours=options.hours,
        excluded=read_excluded(options.exclude, options.exclude_split, CHARACTERS),
        jobs=options.jobs,
        model=_fingerprint(options.model, voices),
    )
    print(f"{options.out / 'manifest.tsv'}: {seconds / 60:.1f} minutes, {count} utterances")


def _fingerprint(model: Path, voices: dict[str, np.ndarray]) -> str:
    """Return a checksum of the model and the voices."""
    with model.open("rb") as file:
        checksum = hashlib.file_digest(file, "sha256")
    for voice in voices.values():
        checksum.update(voice.tobytes())
    return checksum.hexdigest()[:16]


if __name__ == "__main__":
    from las_fast.cli import run

    run(main)
