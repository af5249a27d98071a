"""Train the preset english with one part left out at a time, for a few epochs each, and score all of them alike.

    python -m benchmarks.ablation --data MANIFEST.tsv --init CHECKPOINT --out RUNS [--epochs 4] [--jobs 2]
    python -m benchmarks.robustness --checkpoint RUNS/* --data MANIFEST.tsv --conditions clean "10 dB"

Every training starts from the weights of CHECKPOINT, with the same seed and the same number of epochs. A training that
was interrupted is resumed, and one that is complete is not repeated, so the command can be given again. Each adds a row
to benchmarks/results/recognition.csv with --record.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks import recognition
from las_fast.cli import run
from las_fast.errors import InputError
from las_fast.files import LAST, write_text_atomically

CONFIG = "english"


@dataclass(frozen=True)
class Variant:
    """A training that differs from the preset in one part."""

    what: str  # is different
    settings: str = ""  # options of las_fast.train
    sources: tuple[str, ...] = ()  # of the training utterances, in the manifest's column "source"; empty: all


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
    "four-layers": Variant("four BiLSTMs", "--model.listener.top-layers 3 --model.ctc-layer 3"),
}  # fmt: skip


def write_manifest(data: Path, out: Path, sources: tuple[str, ...]) -> Path:
    """Write a manifest without the training rows of other sources, and return its path.

    Raises:
        InputError: `data` is not a TSV manifest with paths, splits and sources, or has no training row of `sources`.
    """
    with data.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    if not rows or not {"path", "split", "source"} <= rows[0].keys():
        raise InputError(f"{data} has no rows with path, split and source; give a TSV manifest that has these columns")
    kept = [row for row in rows if row["split"] != "train" or row["source"] in sources]
    if not any(row["split"] == "train" for row in kept):
        raise InputError(f"{data} has no training row of the sources {', '.join(sources)}; leave out this variant")
    lines = [list(rows[0])]
    lines += [[str((data.parent / value).absolute()) if key == "path" else value for key, value in row.items()]
              for row in kept]  # fmt: skip
    write_text_atomically(out, "".join("\t".join(line) + "\n" for line in lines))
    return out


def command(name: str, options: argparse.Namespace) -> list[str]:
    """Return the command that trains a variant, or resumes its training."""
    variant, folder = VARIANTS[name], options.out / name
    data = options.data
    if variant.sources:
        data = write_manifest(data, options.out / f"{name}.tsv", variant.sources)
    words = [sys.executable, "-m", "las_fast.train", "--config", CONFIG, "--data", str(data), "--out", str(folder)]
    words += [
        "--init",
        options.init,
        "--training.epochs",
        str(options.epochs),
        "--training.threads",
        str(options.threads),
    ]
    words += ["--training.validate-every", str(options.epochs), *variant.settings.split()]
    return [*words, "--resume"] if (folder / LAST).is_file() else words


def train(name: str, options: argparse.Namespace) -> None:
    """Train a variant; its output goes to OUT/NAME.log. Raises InputError if the training fails."""
    log = options.out / f"{name}.log"
    with log.open("a", encoding="utf-8") as file:
        done = subprocess.run(command(name, options), stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise InputError(f"the training {name} ended with status {done.returncode}; {log} says why")
    print(f"{name}: complete")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--data", type=Path, required=True, help="TSV manifest with the columns path, split and source")
    add("--init", required=True, help="checkpoint that every training starts from")
    add("--out", type=Path, required=True, help="folder of the run folders")
    add("--epochs", type=int, default=4, help="of each training (default: 4)")
    add("--jobs", type=int, default=1, help="trainings at once (default: 1)")
    add("--threads", type=int, default=1, help="CPU threads of each training (default: 1)")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME",
        help=f"any of {', '.join(VARIANTS)} (default: all)")  # fmt: skip
    add(
        "--record", action="store_true", help=f"append a row per training to benchmarks/results/{recognition.FILE.name}"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        for done in [pool.submit(train, name, options) for name in options.variants]:
            done.result()
    for name in options.variants:
        what = f"preset {CONFIG} for {options.epochs} epochs: {VARIANTS[name].what}"
        row = recognition.summary_row(options.out / name, what=what, data="speech, ablation")
        print(f"{name}: CER {row[recognition.COLUMNS.index('cer_last')]}%, {VARIANTS[name].what}")
        if options.record:
            recognition.append_rows(recognition.FILE, recognition.COLUMNS, [row])


if __name__ == "__main__":
    run(main)
