"""python -m las_fast.train: train a Listen, Attend and Spell model on features or audio with transcripts."""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from las_fast.arguments import add_device_option, as_folder, as_path
from las_fast.cli import run
from las_fast.config import (
    Config,
    ModelConfig,
    check,
    check_training,
    from_yaml,
    load_config,
    load_settings,
    presets,
    to_yaml,
)
from las_fast.errors import InputError, print_error
from las_fast.files import AVERAGED, BEST, LAST, lock_folder
from las_fast.options import Parser, parse_settings
from las_fast.system import choose_device, cores
from las_fast.training.adapt import (
    FINETUNE,
    adapt_augment,
    adapt_epochs,
    adapt_features,
    check_extra,
    check_init,
    check_one_process,
    check_packages,
    describe_warp,
    dev_splits,
    extra_splits,
    inherit_lm,
    training_splits,
)
from las_fast.training.schedules import warmup_steps

if TYPE_CHECKING:  # these import torch, which would slow --help down
    from las_fast.checkpoint import Loaded
    from las_fast.data.corpus import Corpus
    from las_fast.data.dataset import SpeechDataset
    from las_fast.training.trainer import Trainer

CONFIG = "config.yaml"  # settings of a run, in its folder
WEIGHT_COPIES = 10  # 4 in last.pt, 1 each in best and averaged, and up to 4 more while a file is being replaced
LOG_BYTES = 2**20  # minimum for the log, curves and pictures
MAX_CHARS_PER_SECOND = 40  # nobody speaks faster
GRACE_CHARS = 10  # in addition, for short clips that begin within a word


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Config]:
    """Return the options, and the settings that they and --config make."""
    parser = Parser(prog="python -m las_fast.train", description=__doc__, add_help=False)
    parser.add_argument("--config", required=True, metavar="NAME|FILE", help=f"preset ({', '.join(presets())}) or YAML")
    parser.add_argument(
        "--data", required=True, type=as_path, metavar="ROOT", help="archive, corpus folder or manifest"
    )
    parser.add_argument(
        "--extra-data", nargs="+", default=[], type=as_path, metavar="ROOT",
        help="further corpora whose training splits are trained on too, such as synthetic speech",
    )  # fmt: skip
    parser.add_argument("--out", required=True, type=as_folder, metavar="RUN", help="run folder to write")
    parser.add_argument("--resume", action="store_true", help="continue the training in --out")
    parser.add_argument(
        "--init", metavar="RUN|FILE|NAME", help="start from the weights of a checkpoint instead of random weights"
    )
    parser.add_argument(
        "--on-bad",
        choices=("error", "skip"),
        help="what to do with utterances that cannot be used (default: that of the settings, data.on_bad)",
    )
    add_device_option(parser)
    options, config = parse_settings(parser, argv, starting_settings, shown=shown_settings)
    options.user_set |= parser.user_set
    if options.on_bad:
        config = replace(config, data=replace(config.data, on_bad=options.on_bad))
    return options, check_training(check(adapt_epochs(config, options.user_set)))


def starting_settings(options: argparse.Namespace) -> Config:
    """Return the settings of --config, and set options.user_set to the names of the settings that the user has set."""
    base = finetuned_settings(options) if options.config == FINETUNE else None
    config, user_set = load_settings(options.config, base)
    options.user_set = set(user_set) | ({"features.size", "features.kind"} if base else set())
    return config


def finetuned_settings(options: argparse.Namespace) -> Config:
    """Return the settings that --config finetune starts from: those of --init, or with --resume those of the run."""
    if options.resume and options.out and (options.out / CONFIG).is_file():  # --help does not need --out
        return load_config(options.out / CONFIG)
    if options.init is None:
        raise InputError(f"--config {FINETUNE} needs --init, the model to start from, such as --init english")
    from las_fast.checkpoint import load_model

    return load_model(options.init).config


def shown_settings(options: argparse.Namespace) -> Config:
    """Return the settings whose values --help shows: those of --config, or the defaults without it."""
    if options.config is None:
        return Config()
    return load_config(options.config) if options.init is None else starting_settings(options)


def main(argv: list[str] | None = None) -> None:
    """Train; see --help."""
    options, config = parse(argv)
    import torch

    from las_fast.data.layouts import open_corpus
    from las_fast.training.origin import write_start
    from las_fast.training.trainer import Trainer

    check_start(options, config)
    device = choose_device(options.device)
    threads = config.training.threads or min(torch.get_num_threads(), cores())
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    corpus, *extra = (open_corpus(root) for root in (options.data, *options.extra_data))
    if corpus.named_split:
        options.data = corpus.root  # for the advice at the end: the dev split is another one
    print(f"data: {corpus.name}")
    config = adapt_settings(options, config, corpus, extra)
    init = load_init(options, config, corpus)
    train_data, dev_data = load_data(config, corpus, extra)
    source = {"kind": corpus.kind, "name": corpus.name}
    if extra:
        source["extra"] = ", ".join(other.name for other in extra)
    with lock_folder(options.out, "training"):
        check_run_folder(options.out, options.resume)  # again: another training may have ended since
        ensure_temporary_folder(options.out)
        trainer = Trainer(config, train_data, dev_data, options.out, device, source)
        begin(trainer, options, init)
        if trainer.progress.step == trainer.steps and not trainer.validation_due:
            print("this training is complete; nothing is left to do")
        else:
            arguments = sys.argv[1:] if argv is None else argv
            start = {"step": trainer.progress.step, "resumed": options.resume, "device": str(trainer.device)}
            write_start(options.out, arguments, **start)
            train(trainer, options, arguments)


def adapt_settings(options: argparse.Namespace, config: Config, corpus: Corpus, extra: list[Corpus]) -> Config:
    """Return the settings, adapted to the data where the user has not set them.

    Raises:
        InputError: the settings, or the corpora of --extra-data, do not fit the data.
    """
    from las_fast.data.degrade import check_logmel

    check_extra(corpus, extra)
    config = check(adapt_augment(adapt_features(config, corpus, options.user_set), corpus, options.user_set))
    check_logmel(config.augment, config.features, corpus.kind)
    describe_warp(config, corpus.kind)
    return config


def begin(trainer: Trainer, options: argparse.Namespace, init: Loaded | None) -> None:
    """Load the state of --resume or the weights of --init, write the settings, and print a summary."""
    from las_fast.files import write_text_atomically

    if options.resume:
        trainer.resume()
    elif init:
        trainer.start_from(init)
        inherit_lm(init, trainer.config, options.out)
    write_text_atomically(options.out / CONFIG, to_yaml(trainer.config))
    print_summary(trainer)


def check_start(options: argparse.Namespace, config: Config) -> None:
    """Raise InputError, before the data is read, if the launcher, a missing package or --out forbids the training."""
    check_one_process()
    check_packages(config)
    check_run_folder(options.out, options.resume)


def train(trainer: Trainer, options: argparse.Namespace, arguments: list[str]) -> None:
    """Run the training and print its result.

    arguments: of the command, for the resume hint.
    """
    from las_fast.training.step import Diverged

    check_disk_space(options.out, trainer)
    try:
        trainer.run()
    except KeyboardInterrupt:
        print_error(resume_hint(trainer, arguments))
        raise
    except (InputError, OSError) as error:
        if trainer.saved_step is not None and not isinstance(error, Diverged):
            print_error(resume_hint(trainer, arguments))
        raise
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"best dev CER {trainer.progress.best_cer:.2f}%; peak memory {peak:.1f} GiB")
    data = trainer.config.data
    split = "SPLIT" if data.dev_share else data.dev or "dev"  # the held-out part is no split of the data
    decode = ["--checkpoint", options.out, "--data", options.data, "--split", split, "--out", f"{split}.csv"]
    print(f"decode with: python -m las_fast.decode {shlex.join(map(str, decode))}")


def check_run_folder(out: Path, resume: bool) -> None:
    """Raise InputError if a training cannot or must not write into the folder `out`."""
    if resume and not (out / LAST).exists():
        raise InputError(f"{out / LAST} does not exist, so there is nothing to resume; start without --resume")
    if not resume and (out / LAST).exists():
        raise InputError(f"{out} already holds a training; add --resume to continue it or choose another --out")
    if not resume:
        check_nothing_is_replaced(out)
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise InputError(f"--out {out}: {existing} is a file; give a folder")
    if not os.access(existing, os.W_OK):
        raise InputError(f"--out {out}: {existing} is not writable; give another folder")


def check_nothing_is_replaced(out: Path) -> None:
    """Raise InputError if a folder without last.pt holds files that a training would overwrite."""
    weights = [name for name in (BEST, AVERAGED) if os.path.isfile(out / name)]
    if weights:
        raise InputError(f"--out {out} holds {weights[0]} without {LAST}; choose another --out, or remove that file")
    settings = out / CONFIG
    if not os.path.isfile(settings):
        return
    with contextlib.suppress(InputError, OSError, UnicodeDecodeError):
        text = settings.read_text(encoding="utf-8")
        # Empty, or from a training that was stopped before its first save: nothing is lost.
        if not text or to_yaml(from_yaml(text, str(settings))) == text:
            return
    raise InputError(f"--out {out}: {settings} would be overwritten; choose another --out")


def ensure_temporary_folder(out: Path) -> None:
    """Use `out` for temporary files, which torch writes, if the system has no folder for them."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError:  # a read-only container
        tempfile.tempdir = os.path.abspath(out)


def check_disk_space(out: Path, trainer: Trainer) -> None:
    """Raise InputError if the disk lacks space for the files of the training, apart from those that exist."""
    parameters = sum(p.numel() for p in trainer.model.parameters())
    present = sum(path.stat().st_size for path in (out / BEST, out / AVERAGED, out / LAST) if path.exists())
    needed, free = 4 * parameters * WEIGHT_COPIES + LOG_BYTES - present, shutil.disk_usage(out).free
    if free < needed:
        raise InputError(
            f"--out {out}: a training of this model needs {needed / 2**20:.0f} MiB, and {free / 2**20:.0f} MiB "
            "are free; free some space or choose another folder"
        )


def load_init(options: argparse.Namespace, config: Config, corpus: Corpus) -> Loaded | None:
    """Load the checkpoint of --init and check that it fits; return None without --init or with --resume."""
    if options.init is None or options.resume:
        return None
    from las_fast.checkpoint import load_model

    init = load_model(options.init)
    check_init(init, config, corpus)
    return init


def resume_hint(trainer: Trainer, arguments: list[str]) -> str:
    """Return the message after an interruption: the saved step, and the command that resumes from it."""
    if trainer.saved_step is None:
        return "\nstopped before anything was saved; start again with the same command"
    resume = [*arguments, *([] if "--resume" in arguments else ["--resume"])]
    return f"\nstopped; step {trainer.saved_step} is saved. To continue: python -m las_fast.train {shlex.join(resume)}"


def print_summary(trainer: Trainer) -> None:
    """Print the size of the model, the batches, the steps and, if cores are unused, the threads."""
    import torch

    from las_fast.data.batch import TRAINING_FRAME_MULTIPLE

    parameters = sum(p.numel() for p in trainer.model.parameters())
    last = trainer.curriculum.batches_of(trainer.config.training.epochs - 1)
    padding = 100 * last.padding_share(0, frame_multiple=TRAINING_FRAME_MULTIPLE)
    precision = str(trainer.precision).removeprefix("torch.")
    print(
        f"model: {parameters / 1e6:.1f} M parameters, {precision} on {trainer.device}; "
        f"{len(last)} batches per epoch, {padding:.1f}% padding; "
        f"from step {trainer.progress.step} to {trainer.steps}"
    )
    note_warmup(trainer)
    threads = torch.get_num_threads()
    if trainer.device.type == "cpu" and threads < cores():
        print(f"threads: {threads} of {cores()} cores; if the others are idle, more --training.threads may be faster")


def note_warmup(trainer: Trainer) -> None:
    """Print the steps of the warm-up if a cycle is too short for those of the settings."""
    training = trainer.config.training
    ends = [trainer.curriculum.steps_before(epoch) for epoch in (0, *training.restarts, training.epochs)]
    steps = min(end - start for start, end in pairwise(ends))
    if (used := warmup_steps(training, steps)) < training.warmup_steps:
        whole, wanted = "cycle" if training.restarts else "run", training.warmup_steps
        print(f"warm-up: shortened from {wanted} to {used} steps, a tenth of the {steps} of the {whole}")


def warn_too_fast(name: str, data: SpeechDataset) -> None:
    """Print a warning if transcripts are too long for the durations of their recordings."""
    too_fast = [
        i for i, text in enumerate(data.texts) if len(text or "") > GRACE_CHARS + MAX_CHARS_PER_SECOND * data.seconds[i]
    ]
    if too_fast:
        first, seconds = too_fast[0], data.seconds[too_fast[0]]
        print(
            f"warning: {len(too_fast)} of {len(data.texts)} transcripts of {name} have more than "
            f"{MAX_CHARS_PER_SECOND} characters per second; the first is {data.ids[first]}, with "
            f"{len(data.texts[first] or '')} in {seconds:.2f} s; check that they belong to these recordings"
        )


def warn_too_long_for_ctc(data: SpeechDataset, model: ModelConfig) -> None:
    """Print a warning if transcripts need more frames than the CTC head has."""
    from las_fast.ops.ctc_loss import min_frames

    reduction = model.listener.reduction_at(model.ctc_layer)
    needed = [min_frames(text or "") for text in data.texts]
    available = [-(-count // reduction) for count in data.frame_counts.tolist()]
    too_long = [i for i, count in enumerate(available) if needed[i] > count]
    if too_long:
        i = too_long[0]
        print(
            f"warning: CTC learns nothing from {len(too_long)} of {len(data.texts)} transcripts, which need more "
            f"frames than its head has; the first is {data.ids[i]}, which needs {needed[i]} and has {available[i]}"
        )


def load_data(config: Config, corpus: Corpus, extra: Sequence[Corpus] = ()) -> tuple[SpeechDataset, SpeechDataset]:
    """Load the training set and the dev set, and print their sizes and warnings.

    extra: corpora whose training splits are added to the training set.

    Raises:
        InputError: there is no such split, or it has no usable utterance.
    """
    from las_fast.data.dataset import load_dataset
    from las_fast.data.holdout import hold_out
    from las_fast.data.overlap import without_shared_texts

    splits, share = training_splits(config, corpus), config.data.dev_share
    name, dev_name = "+".join(splits), f"dev, held out of {'+'.join(splits)}"
    dev_names = () if share else dev_splits(config, corpus)  # before the training set is read, which may take long
    train = load_dataset(corpus, splits, features=config.features, data=config.data, need_text=True)
    if share:
        train, dev = hold_out(train, share)
    else:
        dev_name = "+".join(dev_names)
        dev = load_dataset(
            corpus, dev_names, features=config.features, data=config.data.without_limits(), statistics=train.statistics,
            need_text=True,
        )  # fmt: skip
    if extra:
        train = add_extra(train, extra, config)
        train.renew_statistics(dev)
        name += " with extra data"
    if config.data.shared_texts == "drop":
        whole, train = train, without_shared_texts(train, dev, config.data.characters)
        print(f"{name}: {len(whole) - len(train)} utterances left out, whose transcripts overlap with those of dev")
    for label, data in ((name, train), (dev_name, dev)):
        left_out = f", {len(data.skipped)} left out" if data.skipped else ""
        print(f"{label}: {len(data)} utterances, {data.seconds.sum() / 3600:.2f} hours{left_out}")
        warn_too_fast(label, data)
    if config.model.ctc_layer >= 0:
        warn_too_long_for_ctc(train, config.model)
    warn_of_overlap(train, dev)
    return train, dev


def add_extra(train: SpeechDataset, extra: Sequence[Corpus], config: Config) -> SpeechDataset:
    """Return a training set with the training splits of further corpora added, and print their sizes."""
    from las_fast.data.dataset import load_dataset

    data = replace(config.data, hours=0.0)  # which says how much of --data to use
    for corpus in extra:
        splits = extra_splits(corpus)
        added = load_dataset(
            corpus, splits, features=config.features, data=data, statistics=train.statistics, need_text=True
        )
        print(f"{'+'.join(splits)} of {corpus.root}: {len(added)} utterances, {added.seconds.sum() / 3600:.2f} hours")
        train = train.joined(added)
    return train


def warn_of_overlap(train: SpeechDataset, dev: SpeechDataset) -> None:
    """Print a warning if the training and dev sets share utterances, or parts of recordings."""
    from las_fast.data.overlap import count_overlap

    shared, divided = count_overlap(train, dev)
    if shared:
        print(
            f"warning: {shared} dev utterances are trained on too, so dev scores say nothing about new "
            "speech; choose others with --data.dev or in the manifest's column 'split'"
        )
    elif divided:
        print(
            f"warning: {divided} recordings have parts in both the training and the dev set, so dev scores are for "
            "known voices and rooms; put all parts of a recording into one split"
        )


if __name__ == "__main__":
    run(main)
