"""python -m las_fast.export: write a trained model and its decoding settings to one small file, or to ONNX.

In safetensors, weights are stored in float16; decoding still computes in float32. Decoding settings on the command
line become the file's defaults. The calibration of word confidences, if the checkpoint has one, is copied next to the
file, and so is the checkpoint's language model if the settings use it.

Several checkpoints give the mean of their weights, if they are of one training or began with the same weights. The
first one's settings and language model are used, and no calibration: fit one on the mean.

In ONNX, --out NAME.onnx names two files: NAME.listener.onnx encodes features, and NAME.speller.onnx takes one step of
the speller. las_fast/deploy/onnx_greedy.py runs them without PyTorch.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from las_fast.arguments import as_file
from las_fast.cli import run
from las_fast.config import DecodingConfig, DecodingSettings, check
from las_fast.errors import InputError
from las_fast.files import prepare_output_file, safetensors_format
from las_fast.options import Parser, parse_settings
from las_fast.search.ngram import lm_path_for
from las_fast.system import is_installed

if TYPE_CHECKING:  # importing torch would slow down --help
    from torch import Tensor

    from las_fast.checkpoint import Loaded

FORMATS = ("safetensors", "onnx")


def parser() -> Parser:
    parser = Parser(
        prog="python -m las_fast.export",
        description=__doc__,
        add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        nargs="+",
        action="extend",
        metavar="RUN|FILE|NAME",
        help="run folder, file or released model; of several, the mean of the weights",
    )
    parser.add_argument("--out", required=True, type=as_file, metavar="FILE", help="file to write")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        type=str.lower,
        default="safetensors",
        help="format of the file (default: safetensors)",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command; see --help."""
    loaded: list[Loaded] = []  # filled while parsing, because the checkpoint has the default settings

    def defaults(options: argparse.Namespace) -> DecodingSettings:
        check_suffix(options.out, options.format)
        from las_fast.average import load_mean
        from las_fast.checkpoint import find_checkpoint

        inputs = [find_checkpoint(name) for name in options.checkpoint]
        loaded.append(load_mean(inputs))
        check_outputs = check_out if options.format == "safetensors" else check_onnx_out
        check_outputs(options.out, loaded[0], inputs)
        return DecodingSettings(loaded[0].config.decoding)

    options, settings = parse_settings(parser(), argv, defaults, kind=DecodingSettings)
    if options.format == "onnx":
        check_onnx_settings(loaded[0].config.decoding, settings.decoding)
    write = export if options.format == "safetensors" else export_onnx
    written = write(loaded[0], settings, options.out)
    for path in written:
        print(f"written     {path} ({path.stat().st_size / 1e6:.1f} MB)")


def check_suffix(out: Path, kind: str) -> None:
    """Raise InputError if the output does not have the suffix of its format."""
    suffix = out.suffix.lower()
    for other in FORMATS:
        if other != kind and suffix == f".{other}":
            raise InputError(
                f"--out {out} has the suffix of {other}, but the format is {kind}; add --format {other}, or give a "
                f"name that ends in .{kind}"
            )
    if suffix != f".{kind}":
        raise InputError(f"--out {out}: the output is a model; give a name that ends in .{kind}")


def check_onnx_out(out: Path, loaded: Loaded, inputs: Sequence[Path]) -> None:
    """Raise InputError if the package onnx is missing, or an output would replace an input or an unrelated file."""
    if not is_installed("onnx"):
        raise InputError("--format onnx needs the package onnx; run: pip install onnx")
    for path in onnx_paths(out).values():
        prepare_output_file(
            path,
            "--out",
            what="a model in ONNX",
            inputs=inputs,
            suffixes=(".onnx",),
            may_replace=is_las_fast_onnx,
        )


def check_onnx_settings(before: DecodingConfig, after: DecodingConfig) -> None:
    """Raise InputError if a setting was changed that the models in ONNX do not keep."""
    kept = ("maximum_share", "maximum_extra")
    for name, value in vars(after).items():
        if value != getattr(before, name) and name not in kept:
            option = f"--decoding.{name.replace('_', '-')}"
            raise InputError(
                f"ONNX does not keep {option}, only --decoding.maximum-share and --decoding.maximum-extra; leave it out"
            )


def onnx_paths(out: Path) -> dict[str, Path]:
    """Return the file of each part of a model: NAME.listener.onnx and NAME.speller.onnx for NAME.onnx."""
    return {part: out.with_suffix(f".{part}.onnx") for part in ("listener", "speller")}


def is_las_fast_onnx(path: Path) -> bool:
    """Return whether a file is a model in ONNX that las_fast wrote, from the producer's name near its start."""
    with path.open("rb") as file:
        return b"las_fast" in file.read(64)


def check_out(out: Path, loaded: Loaded, inputs: Sequence[Path]) -> None:
    """Raise InputError if the output would replace an input, weights of a training, or an unrelated file.

    The same holds for the language model and the calibration beside it.
    """
    from las_fast.checkpoint import AVERAGED, BEST, FORMAT, LAST

    prepare_output_file(
        out,
        "--out",
        inputs=inputs,
        what="a model",
        suffixes=(".safetensors",),
        may_replace=lambda path: safetensors_format(path) == FORMAT,
    )
    if out.name in (BEST, AVERAGED) and (out.parent / LAST).exists():
        raise InputError(f"--out {out} belongs to the training in {out.parent}; give another name")
    check_companions(out, loaded)


def calibration_of(loaded: Loaded) -> Path | None:
    """Return the file with the calibration of a model; None if it has none, like every mean of checkpoints."""
    from las_fast.search.confidence import calibration_path_for

    path = calibration_path_for(loaded.path)
    return path if os.path.isfile(path) and not loaded.is_average else None


def check_companions(out: Path, loaded: Loaded) -> None:
    """Raise InputError if the language model or the calibration beside the output must not be replaced or used."""
    from las_fast.search.confidence import calibration_path_for, is_calibration, read_calibration
    from las_fast.search.ngram import is_lm

    checkpoint, calibration = loaded.path, calibration_of(loaded)
    if os.path.isfile(lm_path_for(checkpoint)):
        prepare_output_file(
            lm_path_for(out), "--out", what="a language model", inputs=(lm_path_for(checkpoint),), may_replace=is_lm
        )
    if calibration is not None:
        read_calibration(calibration)  # raises an error if it is damaged
        prepare_output_file(
            calibration_path_for(out),
            "--out",
            what="a calibration",
            inputs=(calibration,),
            may_replace=is_calibration,
        )
    elif os.path.isfile(calibration_path_for(out)):
        home = None if loaded.is_average else calibration_path_for(checkpoint)
        raise InputError(not_of_this_checkpoint(out, calibration_path_for(out), home))


def check_lm(out: Path, checkpoint: Path, ngram_weight: float) -> None:
    """Raise InputError if the checkpoint has no language model for this weight above 0."""
    own, other = lm_path_for(checkpoint), lm_path_for(out)
    if os.path.isfile(own):
        return
    if os.path.isfile(other):
        raise InputError(not_of_this_checkpoint(out, other, own))
    raise InputError(
        f"decoding.ngram_weight is {ngram_weight:g}, but there is no language model {own}; copy it there, or add "
        "--decoding.ngram-weight 0"
    )


def not_of_this_checkpoint(out: Path, other: Path, home: Path | None) -> str:
    """Return the message for a file that would be used with the output; home: where this checkpoint's would be."""
    move = f" or, if it is for this model, move it to {home}" if home else ""
    return f"--out {out}: {other} is not of this checkpoint, but would be used with the output; remove it{move}"


def export(loaded: Loaded, settings: DecodingSettings, out: Path) -> list[Path]:
    """Write the model with float16 weights and these decoding settings, and copy the files that go with it.

    These are its calibration and, if the settings use one, its language model, as far as the checkpoint has them.

    Returns:
        The paths of the files written.

    Raises:
        InputError: the settings do not fit the model or its language model, a weight exceeds float16, or a file cannot
            be written.
    """
    from las_fast.checkpoint import save_model
    from las_fast.files import write_atomically
    from las_fast.search.confidence import calibration_path_for

    if settings.decoding.ngram_weight:
        check_lm(out, loaded.path, settings.decoding.ngram_weight)
    config = check(replace(loaded.config, decoding=settings.decoding))
    weights = {name: to_float16(name, value) for name, value in loaded.model.state_dict().items()}
    save_model(out, weights, config, loaded.statistics, loaded.info)
    companions = [(calibration_of(loaded), calibration_path_for(out))]
    if settings.decoding.ngram_weight:
        companions.append((lm_path_for(loaded.path), lm_path_for(out)))
    written = [out]
    for source, target in companions:
        if source is not None and os.path.isfile(source) and source.resolve() != target.resolve():
            write_atomically(target, partial(shutil.copyfile, source))
            written.append(target)
    return written


def export_onnx(loaded: Loaded, settings: DecodingSettings, out: Path) -> list[Path]:
    """Write the listener and the speller of a model in ONNX, in float32, with two length limits of the settings.

    Returns:
        The paths of the files written.

    Raises:
        InputError: the settings do not fit the model, or a file cannot be written.
    """
    from las_fast.deploy.onnx_model import onnx_models
    from las_fast.files import write_atomically

    models = onnx_models(loaded._replace(config=check(replace(loaded.config, decoding=settings.decoding))))
    paths = onnx_paths(out)
    for part, content in models.items():
        write_atomically(paths[part], lambda path, content=content: path.write_bytes(content))  # type: ignore[misc]
    return [*paths.values()]


def to_float16(name: str, value: Tensor) -> Tensor:
    """Convert a weight to float16; raise InputError, which names it, if a value overflows or is not finite."""
    half = value.half()
    if not half.isfinite().all():
        raise InputError(
            f"{name} contains {float(value.abs().max()):g}, which float16 cannot represent; the model "
            "has diverged: export an earlier checkpoint"
        )
    return half


if __name__ == "__main__":
    run(main)
