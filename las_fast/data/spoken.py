"""A spoken corpus out of nothing: short English sentences said by eSpeak NG, written in the HW4P2 F23 layout.

    ROOT/11-785-f23-hw4p2/{train-clean-100,train-clean-360,dev-clean,test-clean}/mfcc/*.npy    (T, 28) float32
    ROOT/11-785-f23-hw4p2/{train-clean-100,train-clean-360,dev-clean}/transcripts/*.npy        <sos>, characters, <eos>
    ROOT/test-clean.tsv    what the test split says, of which the archive has features only: file, voice, seconds, text
    ROOT/corpus.json       how it was made

Dev and test voices and dev and test sentences never occur in training. The same arguments give the same files, whatever
the number of processes.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soxr

from las_fast.config import FeatureConfig
from las_fast.data.espeak import ACCENTS, Synthesiser, load_espeak
from las_fast.data.features import compute_features
from las_fast.data.sentences import sentence
from las_fast.errors import InputError
from las_fast.options import Parser
from las_fast.progress import Progress
from las_fast.system import cores

ARCHIVE = "11-785-f23-hw4p2"
FEATURES = FeatureConfig(kind="mfcc", size=28, mel_bins=40, normalisation="none")
MOST_WORKERS = 256
SILENT = 600.0  # seconds after which a speaking process is given up
BLOCK = 40  # utterances that one process speaks before it is replaced; part of what makes the files reproducible

SPEAKERS = {  # eSpeak NG voice variants: other formants, pitch and timbre. No speaker serves two kinds of split.
    "train": (
        "m1", "m2", "m3", "m4", "m6", "m8", "f1", "f2", "f4", "klatt2", "klatt4", "Andy", "Annie", "Denis", "Gene",
        "Hugo", "Jacky", "Lee", "Marco", "Michael", "adam", "anika", "belinda", "boris", "david", "ian", "john",
        "linda", "max", "miguel", "pablo", "robert", "shelby", "travis", "zac", "Alicia",
    ),
    "dev": ("m7", "f5", "klatt", "victor", "edward", "sandro"),
    "test": ("m5", "f3", "klatt3", "Andrea", "Mike", "paul", "steph", "Mario"),
}  # fmt: skip


@dataclass(frozen=True)
class Utterance:
    """One thing to say: where it goes, what, in which voice (accent+speaker)."""

    split: str
    name: str
    text: str
    voice: str
    number: int  # counts through the corpus; seeds rate, pitch, volume and noise


# ---------------------------------------------------------------------------------------------------------- sentences


def plan(*, train: int, dev: int, test: int, seed: int) -> list[Utterance]:
    """Return every utterance of the corpus. Sentences within dev and within test are distinct."""
    first = train * 100 // 460  # the two training folders keep the proportion of the real archive
    splits = [
        ("train-clean-100", "train", first), ("train-clean-360", "train", train - first),
        ("dev-clean", "dev", dev), ("test-clean", "test", test),
    ]  # fmt: skip
    utterances: list[Utterance] = []
    for index, (split, role, count) in enumerate(splits):
        rng = np.random.default_rng([seed, index])
        voices = [f"{accent}+{speaker}" for speaker in SPEAKERS[role] for accent in ACCENTS]
        texts: dict[str, None] = {}
        while role != "train" and len(texts) < count:
            texts[sentence(rng, role)] = None
        for i, text in enumerate(texts or (sentence(rng, role) for _ in range(count))):
            voice = voices[int(rng.integers(len(voices)))]
            name = f"{100 * index + voices.index(voice) // len(ACCENTS):03d}-{i:05d}"
            utterances.append(Utterance(split, name, text, voice, len(utterances)))
    return utterances


# ------------------------------------------------------------------------------------------------------------- speech


def record(synthesiser: Synthesiser, utterance: Utterance, *, seed: int) -> np.ndarray:
    """Return the utterance at 16 kHz, float32, with its own rate, pitch, volume, silences and a little noise."""
    rng = np.random.default_rng([seed, 1000, utterance.number])
    rate, pitch, pitch_range = rng.integers(130, 191), rng.integers(35, 66), rng.integers(30, 71)
    wave = synthesiser.speak(
        utterance.text, utterance.voice, rate=int(rate), pitch=int(pitch), pitch_range=int(pitch_range)
    )
    wave = soxr.resample(wave, synthesiser.sample_rate, FEATURES.sample_rate)
    silences = rng.integers(0, FEATURES.sample_rate // 5, size=2)
    wave = np.pad(wave, tuple(map(int, silences)))
    wave *= 10 ** (rng.uniform(-25, -12) / 20) / max(float(np.abs(wave).max()), 1e-3)  # peak in dB of full scale
    noise = 10 ** (rng.uniform(-75, -50) / 20)
    return (wave + noise * rng.standard_normal(len(wave))).astype(np.float32)


def _speak_block(task: tuple[list[Utterance], int, str]) -> list[tuple[str, float]]:
    """Speak the utterances of one task in order, write their files, return (name, seconds) of each."""
    import torch

    utterances, seed, archive = task
    torch.set_num_threads(1)
    with contextlib.closing(Synthesiser()) as synthesiser:
        waves = [record(synthesiser, utterance, seed=seed) for utterance in utterances]
    for utterance, features in zip(utterances, compute_features(waves, FEATURES), strict=True):
        folder = Path(archive) / utterance.split
        np.save(folder / "mfcc" / f"{utterance.name}.npy", np.asarray(features, dtype=np.float32))
        if utterance.split != "test-clean":
            symbols = np.array(["<sos>", *utterance.text, "<eos>"], dtype="<U5")
            np.save(folder / "transcripts" / f"{utterance.name}.npy", symbols)
    return [(u.name, len(wave) / FEATURES.sample_rate) for u, wave in zip(utterances, waves, strict=True)]


# ------------------------------------------------------------------------------------------------------------- corpus


def settings(*, train: int, dev: int, test: int, seed: int) -> dict:
    """Return everything the corpus depends on, as plain data; two equal ones mean equal files."""
    load_espeak()
    sources = [Path(__file__).with_name(f"{name}.py") for name in ("spoken", "sentences", "espeak", "features")]
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    espeak = importlib.metadata.version("espeakng-loader")
    return {"train": train, "dev": dev, "test": test, "seed": seed, "code": code, "espeakng_loader": espeak,
            "features": asdict(FEATURES)}  # fmt: skip


def is_current(root: str | Path, **arguments) -> bool:
    """Say whether root holds the complete corpus that generate would write with these arguments."""
    try:
        return json.loads((Path(root) / "corpus.json").read_text(encoding="utf-8"))["settings"] == settings(**arguments)
    except (OSError, ValueError, KeyError):
        return False


def generate(
    root: str | Path,
    *,
    train: int = 2400,
    dev: int = 120,
    test: int = 200,
    seed: int = 1,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Write the corpus under root and return its archive, root/11-785-f23-hw4p2.

    Args:
        root:  folder that does not exist, is empty, or holds an earlier corpus of this kind (which is replaced).
        train, dev, test: utterances, about 2 seconds each.
        workers: processes; default one a core that this process may use. They change nothing in the files.

    Raises:
        InputError: root holds something else, a size is not positive, or eSpeak NG is not installed.
    """
    root = Path(root)
    for name, size in (("train", train), ("dev", dev), ("test", test)):
        if not 1 <= size <= 99999:
            raise InputError(f"--{name} must be from 1 to 99999 utterances; got {size}")
    if root.exists() and not (root / "corpus.json").is_file() and (not root.is_dir() or any(root.iterdir())):
        raise InputError(f"{root} holds something that is not a spoken corpus; give --out a new folder")
    made = settings(train=train, dev=dev, test=test, seed=seed)
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as temporary:
        new = Path(temporary) / "corpus"
        utterances = plan(train=train, dev=dev, test=test, seed=seed)
        seconds = _speak(utterances, new / ARCHIVE, seed=seed, workers=workers, progress=progress)
        _write_tables(new, utterances, seconds, made)
        if root.exists():
            shutil.rmtree(root)
        os.replace(new, root)
    return root / ARCHIVE


def _speak(utterances, archive: Path, *, seed: int, workers: int | None, progress: bool) -> dict[str, float]:
    for split in dict.fromkeys(u.split for u in utterances):
        (archive / split / "mfcc").mkdir(parents=True)
        if split != "test-clean":
            (archive / split / "transcripts").mkdir()
    tasks = [(utterances[i : i + BLOCK], seed, str(archive)) for i in range(0, len(utterances), BLOCK)]
    seconds: dict[str, float] = {}
    blocks = _in_processes(_speak_block, tasks, workers or cores())
    with Progress(len(utterances), "speaking", "utterances", show=progress) as bar, contextlib.closing(blocks):
        for rows in blocks:
            seconds.update(rows)
            bar.update(len(rows))
    return seconds


def _in_processes(function: Callable, tasks: Sequence, workers: int) -> Generator[Any, None, None]:
    """Yield function(task) of each task as it comes, by so many processes at once and a fresh one for each task.

    What eSpeak NG said before can then not depend on who takes which block.

    Raises:
        InputError: a process ends early, or is silent for long.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["las_fast.data.spoken"])
    with _ignoring(signal.SIGINT, signal.SIGHUP):  # which all processes inherit: this one answers, and ends them
        multiprocessing.forkserver.ensure_running()
    waiting = list(reversed(tasks))
    running: dict[Any, Any] = {}  # pipe: the process that answers through it
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                with _deferring(signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # each process is known, or not there
                    pipe, process = _start(context, function, waiting.pop())
                    running[pipe] = process
            ready = multiprocessing.connection.wait(running, SILENT)
            if not ready:
                raise InputError(f"a speaking process was silent for {SILENT:.0f} s; free some memory and start again")
            for pipe in ready:
                yield _answer(pipe, running.pop(pipe))
    finally:
        for process in running.values():
            process.kill()
            process.join()


def _start(context, function: Callable, task) -> tuple:
    """Start a process that sends function(task); return the pipe that it comes through and the process."""
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(theirs, function, task))
    process.start()
    theirs.close()
    return ours, process


def _send(pipe, function: Callable, task) -> None:
    pipe.send(function(task))


def _answer(pipe, process):
    """Return what a process has sent; raise InputError where it has ended without."""
    try:
        answer = pipe.recv()
    except EOFError:
        process.join()
        raise InputError(
            f"a speaking process ended early (exit status {process.exitcode}); free some memory and start again"
        ) from None
    finally:
        pipe.close()
    process.join()
    return answer


@contextlib.contextmanager
def _ignoring(*numbers: int) -> Iterator[None]:
    """Ignore signals for a moment."""
    with _answering(numbers, signal.SIG_IGN):
        yield


@contextlib.contextmanager
def _deferring(*numbers: int) -> Iterator[None]:
    """Have signals come when the block has ended."""
    came: list[int] = []
    with _answering(numbers, lambda number, _: came.append(number)):
        yield
    for number in came[:1]:
        signal.raise_signal(number)


@contextlib.contextmanager
def _answering(numbers: Sequence[int], handler) -> Iterator[None]:
    old = {number: signal.signal(number, handler) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, own in old.items():
            signal.signal(number, own)


def _write_tables(root: Path, utterances: list[Utterance], seconds: dict[str, float], made: dict) -> None:
    rows = [f"{u.name}\t{u.voice}\t{seconds[u.name]:.3f}\t{u.text}" for u in utterances if u.split == "test-clean"]
    table = "\n".join(["file\tvoice\tseconds\ttext", *sorted(rows)])
    (root / "test-clean.tsv").write_text(table + "\n", encoding="utf-8")
    splits = dict.fromkeys(u.split for u in utterances)
    hours = {s: round(sum(seconds[u.name] for u in utterances if u.split == s) / 3600, 4) for s in splits}
    voices = {s: len({u.voice for u in utterances if u.split == s}) for s in splits}
    info = {"settings": made, "hours": hours, "voices": voices}
    (root / "corpus.json").write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")


def read_test_transcripts(root: str | Path) -> dict[str, tuple[str, float]]:
    """Return file name -> (text, seconds) of the test split, from root/test-clean.tsv."""
    path = Path(root) / "test-clean.tsv"
    if not path.is_file():
        raise InputError(f"{path} is missing; make the corpus again with: python -m las_fast.data.spoken --out {root}")
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    return {name: (text, float(seconds)) for name, _voice, seconds, text in rows}


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Add --train, --dev, --test and --seed with generate's defaults."""
    for name, default, what in (
        ("train", 2400, "training utterances"), ("dev", 120, "development utterances"),
        ("test", 200, "test utterances"), ("seed", 1, "seed of sentences, voices and noise"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default {default})")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m las_fast.data.spoken", description="Generate a spoken corpus.")
    parser.add_argument("--out", required=True, help="folder for the corpus")
    add_sizes(parser)
    parser.add_argument("--workers", type=int, default=None, help="processes (default: one a core)")
    options = parser.parse_args(argv)
    if options.workers is not None and not 1 <= options.workers <= MOST_WORKERS:
        raise InputError(f"--workers must be from 1 to {MOST_WORKERS}; got {options.workers}")
    archive = generate(options.out, train=options.train, dev=options.dev, test=options.test, seed=options.seed,
                       workers=options.workers)  # fmt: skip
    hours = json.loads((Path(options.out) / "corpus.json").read_text(encoding="utf-8"))["hours"]
    print(f"{archive}: " + ", ".join(f"{split} {60 * h:.1f} minutes" for split, h in hours.items()))


if __name__ == "__main__":
    from las_fast.cli import run

    run(main)
