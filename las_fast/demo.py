"""python -m las_fast.demo: synthesise a corpus, train on it, decode its test split, score it and write a report.

    OUT/data             the spoken corpus, an HW4P2 F23 archive
    OUT/run              the training
    OUT/submission.csv   the decoded test split, in the format of that edition
    OUT/result.json      utterances, ld, cer, wer, seconds, audio_seconds, rtfx (seconds: decoding time)
    OUT/report.html      curves, attention, best and worst utterances

A second run with the same settings keeps complete results and resumes an interrupted training.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from las_fast.arguments import add_beam_options, as_folder, check_beam_options
from las_fast.cli import run
from las_fast.config import Config, check, load_config
from las_fast.data import spoken
from las_fast.errors import InputError
from las_fast.options import Parser, check_names, field_names, override
from las_fast.tree import to_tree

PRESET = "tiny"
BEAM = 8  # by default
EXAMPLES = 5  # utterances printed at the end


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of the demo, and the arguments that it passes on to the training."""
    parser = Parser(
        prog="python -m las_fast.demo",
        description="Synthesise a corpus, train on it, decode its test split, score it and write a report.",
        epilog="Any setting of the training can follow, such as --training.epochs 5.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--out", type=as_folder, default=Path("runs/demo"), help="folder for all results (default runs/demo)"
    )
    spoken.add_sizes(parser)
    add_beam_options(parser, beam=BEAM)
    parser.set_defaults(beam=None)  # tells whether it is given
    parser.add_argument("--fresh", action="store_true", help="make everything again, even if it exists")
    parser.fields = tuple(field_names(to_tree(Config())))
    options, rest = parser.parse_known_args(argv)
    check_names(parser, rest)
    check_beam_options(options)
    config = override(parser, load_config(PRESET), rest)  # reports wrong settings before a corpus is synthesised
    options.beam = choose_beam(options.beam, config.decoding.beam if "decoding.beam" in parser.user_set else None)
    check(replace(config, decoding=replace(config.decoding, beam=options.beam)))
    return options, rest


def choose_beam(option: int | None, setting: int | None) -> int:
    """Return the beam that --beam or --decoding.beam gives, or BEAM; raise InputError if they are different."""
    given = {beam for beam in (option, setting) if beam is not None}
    if len(given) > 1:
        raise InputError(f"--beam {option} and --decoding.beam {setting} are different; give one of them")
    return given.pop() if given else BEAM


def main(argv: list[str] | None = None) -> None:
    """Run the demo; see --help."""
    options, rest = parse(argv)
    out: Path = options.out
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; give a folder")
    out.mkdir(parents=True, exist_ok=True)
    sizes = {name: getattr(options, name) for name in ("train", "dev", "test", "seed")}
    with stage(1, "synthesising the corpus"):
        archive = make_corpus(out / "data", sizes, fresh=options.fresh)
    with stage(2, f"training, preset {PRESET}"):
        train(out, archive, sizes, rest, fresh=options.fresh)
    with stage(3, f"decoding test-clean, beam {options.beam}"):
        printed = decode(out, archive, options.beam, options.beam_threshold)
    with stage(4, "scoring and reporting"):
        result, rows = summarise(out, printed)
    show(out, result, rows)


@contextlib.contextmanager
def stage(number: int, name: str) -> Iterator[None]:
    """Print the name of a stage; at its end, print how long it took."""
    print(f"\n[{number}/4] {name}")
    started = time.perf_counter()
    yield
    print(f"[{number}/4] took {time.perf_counter() - started:.0f} s")


def make_corpus(root: Path, sizes: dict, *, fresh: bool) -> Path:
    """Generate the archive under root, unless it exists with the same settings; return its path."""
    if spoken.is_current(root, **sizes) and not fresh:
        print(f"{root} was made with the same settings and is kept")
        return root / spoken.ARCHIVE
    return spoken.generate(root, **sizes)


def train(out: Path, archive: Path, sizes: dict, rest: list[str], *, fresh: bool) -> None:
    """Train in out/run: from the start, from the last save, or not at all if it is complete."""
    from las_fast import train as training
    from las_fast.checkpoint import LAST

    folder, stamp_file = out / "run", out / "training.json"
    settings = {"config": to_tree(load_config(PRESET)), "options": rest, "corpus": spoken.settings(**sizes)}
    previous = read_json(stamp_file)
    if previous is None and folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} contains files that this demo did not make; give --out another folder")
    unchanged = (
        previous is not None and previous["settings"] == json.loads(json.dumps(settings)) and (folder / LAST).is_file()
    )
    if previous is not None and unchanged and previous["complete"] and not fresh:
        print(f"{folder} was trained with the same settings and is kept; --fresh trains again")
        return
    resume = unchanged and not fresh
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    write_json(stamp_file, {"settings": settings, "complete": False})
    arguments = ["--config", PRESET, "--data", str(archive), "--out", str(folder), "--data.cache", str(out / "cache")]
    try:
        training.main([*arguments, *rest, *(["--resume"] if resume else [])])
    except KeyboardInterrupt:
        print("\ninterrupted; run the same demo command to continue", file=sys.stderr)
        raise
    write_json(stamp_file, {"settings": settings, "complete": True})


def decode(out: Path, archive: Path, beam: int, beam_threshold: float | None = None) -> dict:
    """Decode the test split into out/submission.csv; return the JSON that las_fast.decode prints last.

    beam_threshold: that of the trained model if None.
    """
    from las_fast import decode as decoding

    threshold = [] if beam_threshold is None else ["--beam-threshold", str(beam_threshold)]
    tee = Tee(sys.stdout)
    with contextlib.redirect_stdout(tee):
        decoding.main(["--checkpoint", str(out / "run"), "--data", str(archive), "--split", "test-clean",
                       "--out", str(out / "submission.csv"), "--beam", str(beam), *threshold])  # fmt: skip
    return json.loads(tee.getvalue().strip().rpartition("\n")[2])


class Tee(io.StringIO):
    """A stream that stores what is written, and passes it on."""

    def __init__(self, through):
        super().__init__()
        self._through = through

    def write(self, text: str) -> int:
        self._through.write(text)
        return super().write(text)

    def flush(self) -> None:
        self._through.flush()


def summarise(out: Path, printed: dict) -> tuple[dict, list[tuple[str, str, str]]]:
    """Score the submission, write result.json and report.html; return the result and the rows of the submission."""
    from dataclasses import asdict

    from las_fast.output.metrics import score
    from las_fast.output.mistakes import Decoded, DecodedSplit
    from las_fast.training.report import write_report

    rows = read_submission(out / "submission.csv", spoken.read_test_transcripts(out / "data"))
    scores = asdict(score([reference for _, reference, _ in rows], [hypothesis for *_, hypothesis in rows]))
    result = {name: round(value, 4) for name, value in scores.items()}
    result |= {name: printed[name] for name in ("seconds", "audio_seconds", "rtfx")}
    write_json(out / "result.json", result)
    decoded = DecodedSplit([Decoded(*row) for row in rows], result)
    write_report(out / "run", out / "report.html", title="las_fast demo: a spoken corpus", decoded=decoded)
    return result, rows


def read_submission(path: Path, truth: dict[str, tuple[str, float]]) -> list[tuple[str, str, str]]:
    """Read (file name, reference, hypothesis) for each row; rows are in the order of file names.

    Raises:
        InputError: the rows do not match the test utterances.
    """
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    names = sorted(truth)
    numbers = [str(i) for i in range(len(names))]
    if [first for first, _ in rows] not in (numbers, names):
        raise InputError(
            f"{path} has {len(rows)} rows that do not match the {len(names)} test utterances; decode again"
        )
    return [(name, truth[name][0], hypothesis) for name, (_, hypothesis) in zip(names, rows, strict=True)]


def show(out: Path, result: dict, rows: list[tuple[str, str, str]]) -> None:
    """Print the scores, a few examples and the paths of the results."""
    print(
        f"\ntest-clean, {result['utterances']} utterances in unseen voices: CER {result['cer']:.2f}%, "
        f"WER {result['wer']:.2f}%, LD {result['ld']:.2f}; decoded {result['rtfx']:.0f} times faster than real time\n"
    )
    step = max(1, len(rows) // EXAMPLES)
    for name, reference, hypothesis in rows[::step][:EXAMPLES]:
        print(f"{name}  reference   {reference}\n{'':{len(name)}}  hypothesis  {hypothesis}")
    print()
    for label, name in (("report", "report.html"), ("scores", "result.json"), ("submission", "submission.csv"),
                       ("training", "run"), ("corpus", "data")):  # fmt: skip
        print(f"{label:<12}{out / name}")


def read_json(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_json(path: Path, content: dict) -> None:
    from las_fast.files import write_text_atomically

    write_text_atomically(path, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
