"""Generate a speech corpus: short English sentences spoken by eSpeak NG, in the HW4P2 F23 layout.

    ROOT/11-785-f23-hw4p2/{train-clean-100,train-clean-360,dev-clean,test-clean}/mfcc/*.npy    (T, 28) float32
    ROOT/11-785-f23-hw4p2/{train-clean-100,train-clean-360,dev-clean}/transcripts/*.npy        <sos>, characters, <eos>
    ROOT/test-clean.tsv    transcripts of the test split, which the archive lacks: file, voice, seconds, text
    ROOT/corpus.json       settings, hours and voices

No voice and no sentence of dev or test occurs in training. The same arguments give the same files, for any number of
processes.
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

from las_fast.arguments import as_folder
from las_fast.config import FeatureConfig
from las_fast.data.espeak import ACCENTS, Synthesiser, load_espeak
from las_fast.data.features import compute_features
from las_fast.data.sentences import random_sentence
from las_fast.errors import InputError, show
from las_fast.options import Parser
from las_fast.progress import ProgressBar
from las_fast.system import cores

ARCHIVE = "11-785-f23-hw4p2"
NEW = ".new-"  # prefix of the folder in which a corpus is made before it replaces the former one
FEATURES = FeatureConfig(kind="mfcc", size=28, mel_bins=40, normalisation="none")
MAX_WORKERS = 256
TIMEOUT = 600.0  # seconds without a result after which the processes count as hung
BLOCK_SIZE = 40  # utterances per Synthesiser; changing it changes the audio, which depends on the previous utterances

SPEAKERS = {  # role -> eSpeak NG voice variants, which differ in formants, pitch and timbre; no variant has two roles
    "train": (
        "m1", "m2", "m3", "m4", "m6", "m8", "f1", "f2", "f4", "klatt2", "klatt4", "Andy", "Annie", "Denis", "Gene",
        "Hugo", "Jacky", "Lee", "Marco", "Michael", "adam", "anika", "belinda", "boris", "david", "ian", "john",
        "linda", "max", "miguel", "pablo", "robert", "shelby", "travis", "zac", "Alicia",
    ),
    "dev": ("m7", "f5", "klatt", "victor", "edward", "sandro"),
    "test": ("m5", "f3", "klatt3", "Andrea", "Mike", "paul", "steph", "Mario"),
}  # fmt: skip


@dataclass(frozen=True)
class PlannedUtterance:
    """One recording to synthesise."""

    split: str
    name: str  # of its files, without the suffix
    text: str
    voice: str  # ACCENT+SPEAKER
    number: int  # index in the corpus; seeds rate, pitch, volume and noise


# ---------------------------------------------------------------------------------------------------------------- plan


def plan(*, train: int, dev: int, test: int, seed: int) -> list[PlannedUtterance]:
    """List all utterances of the corpus, split by split; sentences are distinct within dev and within test."""
    first = train * 100 // 460  # the same proportion of the two training folders as in the real archive
    splits = [
        ("train-clean-100", "train", first), ("train-clean-360", "train", train - first),
        ("dev-clean", "dev", dev), ("test-clean", "test", test),
    ]  # fmt: skip
    utterances: list[PlannedUtterance] = []
    for index, (split, role, count) in enumerate(splits):
        rng = np.random.default_rng([seed, index])
        voices = [f"{accent}+{speaker}" for speaker in SPEAKERS[role] for accent in ACCENTS]
        texts: dict[str, None] = {}
        while role != "train" and len(texts) < count:
            texts[random_sentence(rng, role)] = None
        for i, text in enumerate(texts or (random_sentence(rng, role) for _ in range(count))):
            voice = voices[int(rng.integers(len(voices)))]
            name = f"{100 * index + voices.index(voice) // len(ACCENTS):03d}-{i:05d}"
            utterances.append(PlannedUtterance(split, name, text, voice, len(utterances)))
    return utterances


# ------------------------------------------------------------------------------------------------------------- speech


def synthesise(synthesiser: Synthesiser, utterance: PlannedUtterance, *, seed: int) -> np.ndarray:
    """Return (N,) float32 samples at 16 kHz, with random rate, pitch, volume, silence at both ends and faint noise."""
    import soxr

    rng = np.random.default_rng([seed, 1000, utterance.number])
    rate, pitch, pitch_range = rng.integers(130, 191), rng.integers(35, 66), rng.integers(30, 71)
    wave = synthesiser.speak(
        utterance.text, utterance.voice, rate=int(rate), pitch=int(pitch), pitch_range=int(pitch_range)
    )
    wave = soxr.resample(wave, synthesiser.sample_rate, FEATURES.sample_rate)
    silences = rng.integers(0, FEATURES.sample_rate // 5, size=2)
    wave = np.pad(wave, tuple(map(int, silences)))
    peak = 10 ** (rng.uniform(-25, -12) / 20)  # -25 to -12 dB relative to full scale
    wave *= peak / max(float(np.abs(wave).max()), 1e-3)
    noise = 10 ** (rng.uniform(-75, -50) / 20)
    return (wave + noise * rng.standard_normal(len(wave))).astype(np.float32)


def _speak_block(task: tuple[list[PlannedUtterance], int, str]) -> list[tuple[str, float]]:
    """Synthesise the utterances of one task in order and write their files; return (name, seconds) of each."""
    import torch

    utterances, seed, archive = task
    torch.set_num_threads(1)
    with Synthesiser() as synthesiser:
        waves = [synthesise(synthesiser, utterance, seed=seed) for utterance in utterances]
    for utterance, features in zip(utterances, compute_features(waves, FEATURES), strict=True):
        folder = Path(archive) / utterance.split
        np.save(folder / "mfcc" / f"{utterance.name}.npy", np.asarray(features, dtype=np.float32))
        if utterance.split != "test-clean":
            symbols = np.array(["<sos>", *utterance.text, "<eos>"], dtype="<U5")
            np.save(folder / "transcripts" / f"{utterance.name}.npy", symbols)
    return [(u.name, len(wave) / FEATURES.sample_rate) for u, wave in zip(utterances, waves, strict=True)]


# ------------------------------------------------------------------------------------------------------------- corpus


def settings(*, train: int, dev: int, test: int, seed: int) -> dict:
    """Return everything that the corpus depends on, for JSON; equal settings mean equal files.

    Raises:
        InputError: eSpeak NG is not installed.
    """
    load_espeak()
    sources = [Path(__file__).with_name(f"{name}.py") for name in ("spoken", "sentences", "espeak", "features")]
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    espeak = importlib.metadata.version("espeakng-loader")
    return {"train": train, "dev": dev, "test": test, "seed": seed, "code": code, "espeakng_loader": espeak,
            "features": asdict(FEATURES)}  # fmt: skip


def is_current(root: str | Path, **arguments) -> bool:
    """Return whether root has the complete corpus that generate would write with these arguments.

    Raises:
        InputError: eSpeak NG is not installed.
    """
    former = _read_settings(Path(root))
    return former is not None and former == settings(**arguments)


def _read_settings(root: Path) -> dict | None:
    """Return the settings in root/corpus.json; None if it is missing or not a file that generate wrote."""
    try:
        found = json.loads((root / "corpus.json").read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return None
    return found if isinstance(found, dict) and "espeakng_loader" in found else None


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
    """Write the corpus under root; return the path of its archive, root/11-785-f23-hw4p2.

    Args:
        root:             folder, which may be missing or empty; an earlier spoken corpus in it is replaced.
        train, dev, test: number of utterances, about 2 seconds each.
        seed:             of sentences, voices and noise.
        workers:          processes; default: one per core available to this process. The files do not depend on it.

    Raises:
        InputError: root contains something else, a size is out of range, eSpeak NG is not installed, or one of its
            processes fails.
    """
    root = Path(root)
    _check_arguments(root, {"train": train, "dev": dev, "test": test})
    corpus_settings = settings(train=train, dev=dev, test=test, seed=seed)
    is_new = not root.exists()
    root.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=NEW, dir=root) as temporary:
            utterances = plan(train=train, dev=dev, test=test, seed=seed)
            new = Path(temporary)
            seconds = _speak(utterances, new / ARCHIVE, seed=seed, workers=workers, progress=progress)
            _write_tables(new, utterances, seconds, corpus_settings)
            _replace_contents(root, new)
    finally:
        if is_new and not any(root.iterdir()):
            root.rmdir()
    return root / ARCHIVE


def _check_arguments(root: Path, sizes: dict[str, int]) -> None:
    """Raise InputError if a size is out of range, or root contains something other than a spoken corpus."""
    for name, size in sizes.items():
        if not 1 <= size <= 99999:
            raise InputError(f"--{name} must be from 1 to 99999 utterances; got {size}")
    if root.exists() and not root.is_dir():
        raise InputError(f"{root} is something other than a spoken corpus; give --out a new folder")
    is_corpus = _read_settings(root) is not None
    if other := [path.name for path in _contents(root) if not (is_corpus and _is_own(path))]:
        raise InputError(
            f"{root} contains something other than a spoken corpus ({show(other[0])}); give --out a new folder"
        )


def _contents(root: Path) -> list[Path]:
    return sorted(root.iterdir()) if root.exists() else []


def _is_own(path: Path) -> bool:
    """Return whether generate writes a file or folder of that name."""
    return path.name in (ARCHIVE, "test-clean.tsv", "corpus.json") or path.name.startswith(NEW)


def _replace_contents(root: Path, new: Path) -> None:
    """Move what is in `new`, a folder in root, to root in place of the former corpus there.

    corpus.json marks a complete corpus, so it goes first and comes last. The folder itself stays: it may be a mount
    point, a link or the current folder.
    """
    (root / "corpus.json").unlink(missing_ok=True)
    for path in filter(_is_own, set(root.iterdir()) - {new}):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for path in sorted(new.iterdir(), key=lambda path: path.name == "corpus.json"):
        os.replace(path, root / path.name)


def _speak(utterances, archive: Path, *, seed: int, workers: int | None, progress: bool) -> dict[str, float]:
    """Synthesise the utterances and write their files; return {name: seconds}."""
    for split in dict.fromkeys(u.split for u in utterances):
        (archive / split / "mfcc").mkdir(parents=True)
        if split != "test-clean":
            (archive / split / "transcripts").mkdir()
    tasks = [(utterances[i : i + BLOCK_SIZE], seed, str(archive)) for i in range(0, len(utterances), BLOCK_SIZE)]
    seconds: dict[str, float] = {}
    blocks = _map_in_processes(_speak_block, tasks, workers or cores())
    with ProgressBar(len(utterances), "synthesising", "utterances", show=progress) as bar, contextlib.closing(blocks):
        for rows in blocks:
            seconds.update(rows)
            bar.update(len(rows))
    return seconds


def _map_in_processes(function: Callable, tasks: Sequence, workers: int) -> Generator[Any, None, None]:
    """Yield function(task) for each task as it completes, in `workers` processes at a time.

    Each task gets a new process, so that a crash of eSpeak NG is noticed.

    Raises:
        InputError: a process ended early or sent no result for TIMEOUT seconds.
    """
    context = multiprocessing.get_context("forkserver")
    # What the tasks import slowly; not this module, which `python -m` runs: runpy would warn in each child.
    context.set_forkserver_preload(["las_fast.data.espeak", "las_fast.data.features"])
    # The children inherit that these signals are ignored; this process handles signals and ends the children.
    with _ignore_signals(signal.SIGINT, signal.SIGHUP):
        multiprocessing.forkserver.ensure_running()
    waiting = list(reversed(tasks))
    running: dict[Any, Any] = {}  # pipe -> process that sends its result through it
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                # A signal between start and registration would leave a process that nothing ends.
                with _defer_signals(signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                    pipe, process = _start(context, function, waiting.pop())
                    running[pipe] = process
            ready = multiprocessing.connection.wait(running, TIMEOUT)
            if not ready:
                raise InputError(f"a speech process sent nothing for {TIMEOUT:.0f} s; free some memory and run again")
            for pipe in ready:
                yield _receive(pipe, running.pop(pipe))
    finally:
        for process in running.values():
            process.kill()
            process.join()


def _start(context, function: Callable, task) -> tuple:
    """Start a process that sends function(task) through a pipe; return the pipe and the process."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, task))
    process.start()
    sender.close()
    return receiver, process


def _send(pipe, function: Callable, task) -> None:
    """Send function(task); run in a process of its own."""
    pipe.send(function(task))


def _receive(pipe, process):
    """Receive the result of a process and wait for its end; raise InputError if it ended without a result."""
    try:
        result = pipe.recv()
    except EOFError:
        process.join()
        raise InputError(
            f"a speech process ended early (exit status {process.exitcode}); free some memory and run again"
        ) from None
    finally:
        pipe.close()
    process.join()
    return result


@contextlib.contextmanager
def _ignore_signals(*numbers: int) -> Iterator[None]:
    """Ignore signals inside the block."""
    with _with_handler(numbers, signal.SIG_IGN):
        yield


@contextlib.contextmanager
def _defer_signals(*numbers: int) -> Iterator[None]:
    """Delay signals until the block has ended."""
    pending: list[int] = []
    with _with_handler(numbers, lambda number, _: pending.append(number)):
        yield
    for number in pending[:1]:
        signal.raise_signal(number)


@contextlib.contextmanager
def _with_handler(numbers: Sequence[int], handler) -> Iterator[None]:
    old_handlers = {
        number: signal.signal(number, handler) for number in numbers if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in old_handlers.items():
            signal.signal(number, handler)


def _write_tables(
    root: Path, utterances: list[PlannedUtterance], seconds: dict[str, float], corpus_settings: dict
) -> None:
    rows = [f"{u.name}\t{u.voice}\t{seconds[u.name]:.3f}\t{u.text}" for u in utterances if u.split == "test-clean"]
    table = "\n".join(["file\tvoice\tseconds\ttext", *sorted(rows)])
    (root / "test-clean.tsv").write_text(table + "\n", encoding="utf-8")
    splits = dict.fromkeys(u.split for u in utterances)
    hours = {s: round(sum(seconds[u.name] for u in utterances if u.split == s) / 3600, 4) for s in splits}
    voices = {s: len({u.voice for u in utterances if u.split == s}) for s in splits}
    info = {"settings": corpus_settings, "hours": hours, "voices": voices}
    (root / "corpus.json").write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")


def read_test_transcripts(root: str | Path) -> dict[str, tuple[str, float]]:
    """Read root/test-clean.tsv; return {file name: (text, seconds)} of the test split.

    Raises:
        InputError: the file is missing.
    """
    path = Path(root) / "test-clean.tsv"
    if not path.is_file():
        raise InputError(
            f"{path} is missing; generate the corpus again with: python -m las_fast.data.spoken --out {root}"
        )
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    return {name: (text, float(seconds)) for name, _voice, seconds, text in rows}


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Add the options --train, --dev, --test and --seed, with the defaults of `generate`."""
    for name, default, what in (
        ("train", 2400, "training utterances"), ("dev", 120, "development utterances"),
        ("test", 200, "test utterances"), ("seed", 1, "seed of sentences, voices and noise"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default {default})")


def main(argv: list[str] | None = None) -> None:
    """Run the command; see --help."""
    parser = Parser(prog="python -m las_fast.data.spoken", description="Generate a speech corpus with eSpeak NG.")
    parser.add_argument("--out", required=True, type=as_folder, help="folder for the corpus")
    add_sizes(parser)
    parser.add_argument("--workers", type=int, default=None, help="processes (default: one per core)")
    options = parser.parse_args(argv)
    if options.workers is not None and not 1 <= options.workers <= MAX_WORKERS:
        raise InputError(f"--workers must be from 1 to {MAX_WORKERS}; got {options.workers}")
    archive = generate(options.out, train=options.train, dev=options.dev, test=options.test, seed=options.seed,
                       workers=options.workers)  # fmt: skip
    hours = json.loads((Path(options.out) / "corpus.json").read_text(encoding="utf-8"))["hours"]
    print(f"{archive}: " + ", ".join(f"{split} {60 * h:.1f} minutes" for split, h in hours.items()))


if __name__ == "__main__":
    from las_fast.cli import run

    run(main)
