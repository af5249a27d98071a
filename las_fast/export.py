"""python -m las_fast.export: a trained model as one small file to pass on, with the settings to decode with.

Weights are stored in float16 and computed with in float32 as before. Decoding settings given here become the file's
own, which --checkpoint FILE then decodes with where nothing else is said. A language model that these settings use and
that lies beside the checkpoint is copied beside the file.
"""

from __future__ import annotations

import argparse
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from las_fast.cli import run
from las_fast.config import DecodingSettings, check
from las_fast.errors import InputError
from las_fast.files import make_room, safetensors_format
from las_fast.options import Parser, as_file, parse_settings
from las_fast.search.ngram import beside

if TYPE_CHECKING:  # these import torch, which --help need not wait for
    from torch import Tensor

    from las_fast.checkpoint import Loaded


def parser() -> Parser:
    own = Parser(prog="python -m las_fast.export", description=__doc__, add_help=False)
    own.add_argument("--checkpoint", required=True, metavar="RUN|FILE|NAME", help="training folder, file or name")
    own.add_argument("--out", required=True, type=as_file, metavar="FILE.safetensors", help="the file to write")
    return own


def main(argv: list[str] | None = None) -> None:
    """Export; see --help."""
    loaded: list[Loaded] = []  # made while parsing: the checkpoint brings the default settings

    def defaults(options: argparse.Namespace) -> DecodingSettings:
        from las_fast.checkpoint import load_model

        loaded.append(load_model(options.checkpoint))
        check_out(options.out, loaded[0].path)
        return DecodingSettings(loaded[0].config.decoding)

    options, settings = parse_settings(parser(), argv, defaults, kind=DecodingSettings)
    written = export(loaded[0], settings, options.out)
    for path in written:
        print(f"written     {path} ({path.stat().st_size / 1e6:.1f} MB)")


def check_out(out: Path, checkpoint: Path) -> None:
    """Raise InputError where the file must not be written: over the checkpoint, a training's own or something else."""
    from las_fast.checkpoint import AVERAGED, BEST, FORMAT, LAST
    from las_fast.search.ngram import is_lm

    make_room(
        out,
        "--out",
        inputs=(checkpoint,),
        what="a model",
        suffixes=(".safetensors",),
        ours=lambda path: safetensors_format(path) == FORMAT,
    )
    if out.name in (BEST, AVERAGED) and (out.parent / LAST).exists():
        raise InputError(f"--out {out} belongs to the training in {out.parent}; give another name")
    if os.path.isfile(beside(checkpoint)):
        make_room(beside(out), "--out", what="a language model", inputs=(beside(checkpoint),), ours=is_lm)


def export(loaded: Loaded, settings: DecodingSettings, out: Path) -> list[Path]:
    """Write the model with float16 weights and these decoding settings, and its language model where they use it.

    Returns the files written.
    """
    from las_fast.checkpoint import save_model
    from las_fast.files import write_atomically

    config = check(replace(loaded.config, decoding=settings.decoding))
    weights = {name: in_half(name, value) for name, value in loaded.model.state_dict().items()}
    save_model(out, weights, config, loaded.statistics, loaded.info)
    theirs, ours = beside(loaded.path), beside(out)
    if not settings.decoding.ngram_weight or not os.path.isfile(theirs) or theirs.resolve() == ours.resolve():
        return [out]
    write_atomically(ours, lambda path: shutil.copyfile(theirs, path))
    return [out, ours]


def in_half(name: str, value: Tensor) -> Tensor:
    """Return a tensor in float16; raise InputError where that cannot hold it."""
    half = value.half()
    if not half.isfinite().all():
        raise InputError(f"{name} holds {float(value.abs().max()):g}, more than float16 can; the model has diverged")
    return half


if __name__ == "__main__":
    run(main)
