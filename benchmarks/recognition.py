"""What a training tried and what came of it: a row of benchmarks/results/recognition.csv, read off its folder.

    python -m benchmarks.recognition RUN --data NAME --what "speed perturbation 0.15 instead of 0.1" [--record]
    python -m benchmarks.recognition --table

Scores are those of the validations: greedy, on the dev split. "formed" is the first epoch from which the attention
monitor said at every validation that the attention had formed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks import record
from las_fast import checkpoint
from las_fast.config import from_yaml
from las_fast.errors import InputError

FILE = record.RESULTS / "recognition.csv"
COLUMNS = ("date", "commit", "run", "what", "data", "seed", "parameters_m", "epochs", "core_hours", "formed",
           "cer_before_formed", "cer_when_formed", "cer_best", "ld_best", "cer_last")  # fmt: skip
SHOWN = {"what": "what was tried", "data": "data", "seed": "seed", "parameters_m": "M parameters", "epochs": "epochs",
         "core_hours": "core hours", "formed": "formed at epoch", "cer_before_formed": "CER before",
         "cer_when_formed": "CER then", "cer_best": "best CER, greedy"}  # fmt: skip


def validations(run: Path) -> list[dict]:
    """Return the rows of a training's validations."""
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    found = [row for row in map(json.loads, lines) if row["kind"] == "valid"]
    if not found:
        raise InputError(f"{run} has no validation yet; wait for its first")
    return found


def since_formed(rows: list[dict]) -> int:
    """Return the first validation from which all say that the attention has formed; their number where none does."""
    first = len(rows)
    while first and rows[first - 1]["monitor"]["formed"]:
        first -= 1
    return first


def row_of(run: Path, *, what: str, data: str) -> tuple:
    """Return a row of COLUMNS."""
    rows, config = validations(run), from_yaml((run / "config.yaml").read_text(encoding="utf-8"), str(run))
    formed, best = since_formed(rows), min(rows, key=lambda row: row["cer"])
    parameters = sum(p.numel() for p in checkpoint.build_model(config).parameters()) / 1e6
    then = [f"{rows[formed - 1]['cer']:.2f}" if formed else "", ""]
    epoch = ""
    if formed < len(rows):
        epoch, then[1] = f"{rows[formed]['epoch']:g}", f"{rows[formed]['cer']:.2f}"
    scores = (f"{best['cer']:.2f}", f"{best['ld']:.3f}", f"{rows[-1]['cer']:.2f}")
    about = (run.name, what, data, config.training.seed, f"{parameters:.1f}", f"{rows[-1]['epoch']:g}")
    date, commit = record.where()[:2]
    return (date, commit, *about, f"{rows[-1].get('core_hours', float('nan')):.2f}", epoch, *then, *scores)


def table(rows: list[dict[str, str]]) -> str:
    """Return Markdown."""
    lines = [f"| {' | '.join(SHOWN.values())} |", f"|{len(SHOWN) * '---|'}"]
    lines += [f"| {' | '.join(row[name] for name in SHOWN)} |" for row in rows]
    return "\n".join(lines)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recognition", description=__doc__.split("\n")[0])
    parser.add_argument("run", nargs="?", type=Path, help="folder of a training")
    parser.add_argument("--what", default="", help="what was tried, against which other training")
    parser.add_argument("--data", default="", help="name of the data")
    parser.add_argument("--record", action="store_true", help=f"append the row to {FILE.name}")
    parser.add_argument("--table", action="store_true", help="print all rows as Markdown")
    options = parser.parse_args(words)
    if options.run:
        row = row_of(options.run, what=options.what, data=options.data)
        print("\n".join(f"{name:<20}{value}" for name, value in zip(COLUMNS, row, strict=True)))
        if options.record:
            record.append(FILE, COLUMNS, [row])
    if options.table:
        print(table(record.read(FILE)))


if __name__ == "__main__":
    main()
