"""Train the preset english several times for a few epochs, each time with one part changed, and compare the scores.

    python -m benchmarks.ablation --data MANIFEST --init CHECKPOINT --out RUNS [--epochs 4] [--jobs 2] [--record]
        [--extra-data kokoro/speech]
    python -m benchmarks.robustness --checkpoint RUNS/whole RUNS/no-noise --data MANIFEST --conditions clean "10 dB"

Every training starts from the weights of CHECKPOINT, with the same seed and the same number of epochs; old-data has
fewer utterances, so it takes fewer steps, and synthetic, which needs --extra-data, has more. A training that was
interrupted is resumed, and one that is complete is not repeated, so the command can be given again. With --record, each
training adds a row to benchmarks/results/recognition.csv when it is complete, if there is no such row yet.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from benchmarks import recognition
from las_fast.cli import run
from las_fast.data.layouts import open_corpus
from las_fast.data.manifest import rows_by_id
from las_fast.errors import InputError
from las_fast.files import LAST, write_text_atomically

CONFIG = "english"
SYNTHETIC = "synthetic"  # the variant with the corpora of --extra-data


@dataclass(frozen=True)
class Variant:
    """A training that differs from the preset in one part."""

    what: str  # what is different
    settings: str = ""  # options of las_fast.train
    sources: tuple[str, ...] = ()  # of the training utterances, by the manifest's column "source"; empty: all


# The sources that speech13h of version 0.3 was trained on.
FIRST_SOURCES = ("librispeech-test-clean", "librispeech-train-sample", "commonvoice-v1-valid-dev", "speechocean762",
                 "ljspeech-part", "asterisk-en")  # fmt: skip
VARIANTS = {
    "whole": Variant("nothing is left out"),
    "old-data": Variant("12.4 instead of 16.7 hours", sources=FIRST_SOURCES),
    "no-noise": Variant("without noise and babble", "--augment.noise 0 --augment.babble 0"),
    "no-rooms": Variant("without rooms, bands and silence",
                        "--augment.room 0 --augment.band-limit 0 --augment.silence 0"),
    "no-warp": Variant("without shifted frequencies", "--augment.warp 0"),
    "no-masks": Variant("without masks", "--augment.time-masks 0 --augment.frequency-masks 0"),
    "no-top-ctc": Variant("CTC on the second BiLSTM alone", "--model.ctc-layer 1 --model.inner-ctc-layer -1"),
    SYNTHETIC: Variant("with synthetic speech"),
    "four-layers": Variant("four BiLSTMs", "--model.listener.top-layers 3 --model.ctc-layer 3"),
}  # fmt: skip


def write_manifest(data: str, out: Path, sources: tuple[str, ...]) -> Path:
    """Write a manifest without the training utterances of other sources, and return its path.

    Raises:
        InputError: `data` is not a manifest of whole recordings with the column "source", or has no such utterance.
    """
    corpus = open_corpus(data)
    rows = rows_by_id(corpus.root) if corpus.root.is_file() else {}
    lines = [["id", "path", "split", "transcript"]]
    for role in ("train", "dev"):
        utterances = [u for split in corpus.resolve(role) for u in corpus.utterances(split)]
        if any(u.is_part or "source" not in rows.get(u.id, {}) for u in utterances):
            raise InputError(f"{data} is not a manifest of whole recordings with the column source; leave out old-data")
        chosen = [u for u in utterances if role == "dev" or rows[u.id]["source"] in sources]
        if not chosen:
            raise InputError(f"{data} has no utterance of the sources {', '.join(sources)}; leave out old-data")
        lines += [[u.id, str(u.path.absolute()), role, str(u.transcript)] for u in chosen]
    write_text_atomically(out, "".join("\t".join(line) + "\n" for line in lines))
    return out


def command(name: str, options: argparse.Namespace) -> list[str]:
    """Return the command that trains a variant, or resumes its training."""
    variant, folder = VARIANTS[name], options.out / name
    data = options.data
    if variant.sources:
        data = write_manifest(data, options.out / f"{name}.tsv", variant.sources)
    words = [sys.executable, "-m", "las_fast.train", "--config", CONFIG, "--data", str(data), "--out", str(folder)]
    epochs = str(options.epochs)
    words += ["--init", options.init, "--training.epochs", epochs, "--training.validate-every", epochs]
    words += ["--training.threads", str(options.threads), *variant.settings.split()]
    words += ["--extra-data", *options.extra_data] if name == SYNTHETIC else []
    return [*words, "--resume"] if (folder / LAST).is_file() else words


class Trainings:
    """Programs that run at the same time; `stop` ends them, and none can be started after it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: list[subprocess.Popen] = []
        self._stopped = False

    def run(self, words: list[str], log: Path) -> None:
        """Run a program and wait for it; its output is appended to `log`. Raises InputError if it fails."""
        with log.open("a", encoding="utf-8") as file:
            with self._lock:
                if self._stopped:
                    return
                process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)
                self._running.append(process)
            status = process.wait()
        if status:
            raise InputError(f"the training {log.stem} ended with status {status}; {log} says why")

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()


def train_all(options: argparse.Namespace) -> Generator[str]:
    """Train all variants, --jobs at once; yield the name of each that is complete.

    If one fails or the program is stopped, the others are stopped: they can resume.
    """
    commands = {name: command(name, options) for name in options.variants}  # raises errors before any training starts
    trainings = Trainings()
    with ThreadPoolExecutor(options.jobs) as pool:
        try:
            futures = {
                pool.submit(trainings.run, words, options.out / f"{name}.log"): name for name, words in commands.items()
            }
            for done in as_completed(futures):
                done.result()
                yield futures[done]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            trainings.stop()
            raise


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--data", required=True, help="manifest; old-data needs its column source")
    add("--extra-data", nargs="+", default=[], metavar="ROOT", help="further training data, of the variant synthetic")
    add("--init", required=True, help="checkpoint that every training starts from")
    add("--out", type=Path, required=True, help="folder of the run folders")
    add("--epochs", type=int, default=4, help="of each training (default: 4)")
    add("--jobs", type=int, default=1, help="trainings at once (default: 1)")
    add("--threads", type=int, default=1, help="CPU threads of each training (default: 1)")
    add("--variants", nargs="+", choices=VARIANTS, metavar="NAME",
        help=f"any of {', '.join(VARIANTS)} (default: all; {SYNTHETIC} only with --extra-data)")  # fmt: skip
    add(
        "--record", action="store_true", help=f"append a row per training to benchmarks/results/{recognition.FILE.name}"
    )
    options = parser.parse_args(argv)
    options.variants = options.variants or [name for name in VARIANTS if options.extra_data or name != SYNTHETIC]
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    if options.jobs < 1:
        raise InputError(f"--jobs must be at least 1; got {options.jobs}")
    if SYNTHETIC in options.variants and not options.extra_data:
        raise InputError(f"the variant {SYNTHETIC} needs --extra-data, such as the output of las_fast.data.kokoro")
    options.out.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(train_all(options)) as names:
        for name in names:
            what = f"preset {CONFIG} for {options.epochs} epochs: {VARIANTS[name].what}"
            row = recognition.summary_row(options.out / name, what=what, data="speech, ablation")
            print(f"{name}: CER {row[recognition.COLUMNS.index('cer_last')]}%, {VARIANTS[name].what}")
            if options.record:
                recognition.record(row)


if __name__ == "__main__":
    run(main)
