"""python -m las_fast.train: from (features or audio, transcript) pairs to a Listen, Attend and Spell model."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import os
import resource
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from operator import attrgetter, eq
from pathlib import Path
from typing import TYPE_CHECKING

from las_fast.cli import run
from las_fast.config import Config, ModelConfig, check, from_yaml, load_config, presets, to_yaml
from las_fast.errors import InputError, print_error
from las_fast.files import AVERAGED, BEST, LAST, make_folder
from las_fast.options import Parser, as_path, parse_settings
from las_fast.system import choose_device, cores

if TYPE_CHECKING:  # these import torch, which --help need not wait for
    from las_fast.checkpoint import Loaded
    from las_fast.data.dataset import Corpus, SpeechDataset
    from las_fast.training.trainer import Trainer

COPIES = 10  # of the weights: four in last.pt, one each in best and averaged, and those in the making beside them
FASTEST, SPELLED = 40, 10  # characters a second that nobody reaches, but for so many: a short cut may lose its start
ROOM = 2**20  # bytes for log, curves and pictures, at least


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Config]:
    parser = Parser(prog="python -m las_fast.train", description=__doc__, add_help=False)
    parser.add_argument("--config", required=True, metavar="NAME|FILE", help=f"preset ({', '.join(presets())}) or YAML")
    parser.add_argument("--data", required=True, type=as_path, metavar="ROOT", help="archive, LibriSpeech or manifest")
    parser.add_argument("--out", required=True, type=as_path, metavar="RUN", help="folder for all that training writes")
    parser.add_argument("--resume", action="store_true", help="continue the training in --out")
    parser.add_argument("--init", metavar="RUN|FILE|NAME", help="begin with a checkpoint's weights, not random ones")
    parser.add_argument("--on-bad", choices=("error", "skip"), help="what to do with an unusable utterance")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    options, config = parse_settings(parser, argv, lambda options: load_config(options.config))
    if options.on_bad:
        config = replace(config, data=replace(config.data, on_bad=options.on_bad))
    return options, check(config)


def main(argv: list[str] | None = None) -> None:
    """Train; see --help."""
    options, config = parse(argv)
    import torch

    from las_fast.data.dataset import open_corpus
    from las_fast.files import write_text_atomically
    from las_fast.training.trainer import Trainer

    check_out(options.out, options.resume)
    init = load_init(options, config)
    device = choose_device(options.device)
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    corpus = open_corpus(options.data)
    print(f"data: {corpus.name}")
    train_data, dev_data = load_data(config, corpus)
    source = {"kind": corpus.kind, "name": corpus.name}
    with held(options.out):
        find_temporary_folder(options.out)
        trainer = Trainer(config, train_data, dev_data, options.out, device, source)
        if options.resume:
            trainer.resume()
        elif init:
            trainer.begin_with(init.model, init.path)
        write_text_atomically(options.out / "config.yaml", to_yaml(config))
        describe(trainer)
        if trainer.progress.step == trainer.steps and not trainer.owes_validation:
            print("this training is finished already; nothing is left to do")
        else:
            train(trainer, options, sys.argv[1:] if argv is None else argv)


def train(trainer: Trainer, options: argparse.Namespace, words: list[str]) -> None:
    """Run the training to its end, and say what came of it; `words` are the command's, to go on with."""
    from las_fast.training.trainer import Diverged

    check_room(options.out, trainer)
    try:
        trainer.run()
    except KeyboardInterrupt:
        print_error(how_to_go_on(trainer, words))
        raise
    except (InputError, OSError) as error:
        if trainer.saved_step and not isinstance(error, Diverged):
            print_error(how_to_go_on(trainer, words))
        raise
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"best dev CER {trainer.progress.best_cer:.2f}%; peak memory {peak:.1f} GiB")
    decode = ["--checkpoint", options.out, "--data", options.data, "--split", "dev", "--out", "dev.csv"]
    print(f"decode with: python -m las_fast.decode {shlex.join(map(str, decode))}")


def check_out(out: Path, resume: bool) -> None:
    """Raise InputError where training cannot write into the folder `out`, or must not."""
    if resume and not (out / LAST).exists():
        raise InputError(f"{out / LAST} does not exist, so there is nothing to resume; start without --resume")
    if not resume and (out / LAST).exists():
        raise InputError(f"{out} already holds a training; add --resume to continue it or choose another --out")
    if not resume:
        check_nothing_is_replaced(out)
    standing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not standing.is_dir():
        raise InputError(f"--out {out}: {standing} is a file; give a folder")
    if not os.access(standing, os.W_OK):
        raise InputError(f"--out {out}: {standing} may not be written; give another folder")


def check_nothing_is_replaced(out: Path) -> None:
    """Raise InputError where a folder without a training's state holds files that a training would write over."""
    weights = [name for name in (BEST, AVERAGED) if os.path.isfile(out / name)]
    if weights:
        raise InputError(f"--out {out} holds {weights[0]} of another training; choose another --out or remove it")
    settings = out / "config.yaml"
    if not os.path.isfile(settings):
        return
    with contextlib.suppress(InputError, OSError, UnicodeDecodeError):
        text = settings.read_text(encoding="utf-8")
        if not text or to_yaml(from_yaml(text, str(settings))) == text:  # of a training that was stopped at its start
            return
    raise InputError(f"--out {out}: {settings} would be replaced by the training's own; choose another --out")


@contextlib.contextmanager
def held(out: Path) -> Iterator[None]:
    """Make the folder `out` and keep other trainings out of it meanwhile; raise InputError where one is in it."""
    make_folder(out, "--out")
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise InputError(f"another training is writing into {out}; wait for it or choose another --out") from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(folder)


def find_temporary_folder(out: Path) -> None:
    """Have Python make temporary files in `out` where it can make them nowhere else: torch wants a place for them."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError:  # a container whose system is read-only
        tempfile.tempdir = os.path.abspath(out)


def check_room(out: Path, trainer: Trainer) -> None:
    """Raise InputError where the disk cannot hold what the training will write beside what is there already."""
    numbers = sum(p.numel() for p in trainer.model.parameters())
    there = sum(path.stat().st_size for path in (out / BEST, out / AVERAGED, out / LAST) if path.exists())
    needed, free = 4 * numbers * COPIES + ROOM - there, shutil.disk_usage(out).free
    if free < needed:
        raise InputError(
            f"--out {out}: a training of this model needs {needed / 2**20:.0f} MiB and {free / 2**20:.0f} are free "
            "there; free some space or choose another folder"
        )


def load_init(options: argparse.Namespace, config: Config) -> Loaded | None:
    """Return the model of --init, whose characters and features must be those of config; None where there is none."""
    if not options.init or options.resume:
        return None
    from las_fast.checkpoint import load_model

    init = load_model(options.init)
    for name in ("data.characters", *(f"features.{f.name}" for f in dataclasses.fields(config.features))):
        theirs, ours = (attrgetter(name)(c) for c in (init.config, config))
        if theirs != ours:
            raise InputError(f"--init {init.path} was trained with {name} {theirs}, not {ours}; use its settings")
    return init


def how_to_go_on(trainer: Trainer, arguments: list[str]) -> str:
    """Return the lines that an interrupted training ends with."""
    if trainer.saved_step is None:
        return "\nstopped before anything was saved; start again with the same command"
    words = [*arguments, *([] if "--resume" in arguments else ["--resume"])]
    return f"\nstopped; step {trainer.saved_step} is saved. To go on: python -m las_fast.train {shlex.join(words)}"


def describe(trainer: Trainer) -> None:
    import torch

    parameters = sum(p.numel() for p in trainer.model.parameters())
    last = trainer.course.of(trainer.config.training.epochs - 1)
    share = 100 * last.padding_share(0)
    precision = str(trainer.precision).removeprefix("torch.")
    print(
        f"model: {parameters / 1e6:.1f} M parameters, {precision} on {trainer.device}; "
        f"{len(last)} batches an epoch, {share:.1f}% padding; "
        f"from step {trainer.progress.step} to {trainer.steps}"
    )
    threads = torch.get_num_threads()
    if trainer.device.type == "cpu" and threads < cores():
        print(f"threads: {threads} of {cores()}; where the other cores are idle, more --training.threads may be faster")


def warn_of_hasty(name: str, data: SpeechDataset) -> None:
    """Print a warning where transcripts have more characters than anyone can say in their time."""
    hasty = [i for i, text in enumerate(data.texts) if len(text or "") > SPELLED + FASTEST * data.seconds[i]]
    if hasty:
        first, seconds = hasty[0], data.seconds[hasty[0]]
        print(
            f"warning: {len(hasty)} of {len(data.texts)} transcripts of {name} have more than {FASTEST} characters a "
            f"second, the first that of {data.ids[first]}: {len(data.texts[first] or '')} in {seconds:.2f} s; "
            "see whether they belong to these recordings"
        )


def warn_of_crowded(data: SpeechDataset, model: ModelConfig) -> None:
    """Print a warning where the CTC head has fewer frames than a transcript needs: a blank parts equal neighbours."""
    reduction = model.listener.reduction_at(model.ctc_layer)
    needed = [len(text) + sum(map(eq, text, text[1:])) for text in (known or "" for known in data.texts)]
    there = [-(-frames // reduction) for frames in data.frames.tolist()]
    crowded = [i for i, frames in enumerate(there) if needed[i] > frames]
    if crowded:
        i = crowded[0]
        print(
            f"warning: CTC learns nothing from {len(crowded)} of {len(data.texts)} transcripts, which need more frames "
            f"than its head has; the first is that of {data.ids[i]}, {needed[i]} of {there[i]}"
        )


def load_data(config: Config, corpus: Corpus) -> tuple[SpeechDataset, SpeechDataset]:
    """Return the training and dev sets, their features cached and checked."""
    from las_fast.data.dataset import divided_recordings, load_dataset, shared_recordings

    train_splits = config.data.train or corpus.resolve("train")
    dev_splits = corpus.resolve(config.data.dev or "dev")
    train = load_dataset(corpus, tuple(train_splits), features=config.features, data=config.data, need_text=True)
    dev = load_dataset(
        corpus, dev_splits, features=config.features, data=config.data.whole(), statistics=train.statistics,
        need_text=True,
    )  # fmt: skip
    for name, data in (("+".join(train_splits), train), ("+".join(dev_splits), dev)):
        if len(data) == 0:
            raise InputError(f"{name} of {corpus.name} has no usable utterance; give another split or root")
        left_out = f", {len(data.skipped)} left out" if data.skipped else ""
        print(f"{name}: {len(data)} utterances, {data.seconds.sum() / 3600:.2f} hours{left_out}")
        warn_of_hasty(name, data)
    if config.model.ctc_layer >= 0:
        warn_of_crowded(train, config.model)
    if shared := shared_recordings(train, dev):
        print(
            f"warning: {shared} dev utterances are trained on too; the dev scores say nothing about new speech; "
            "name other utterances with --data.dev, or in the manifest's column split"
        )
    elif divided := divided_recordings(train, dev):
        print(
            f"warning: {divided} recordings have parts in both the training and the dev splits; the dev scores are for "
            "voices and rooms that are trained on; put all parts of a recording into one split"
        )
    return train, dev


if __name__ == "__main__":
    run(main)
