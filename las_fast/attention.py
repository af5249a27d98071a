"""python -m las_fast.attention: draw the attention of a model to a recording, below the spectrogram.

    python -m las_fast.attention talk.flac --start 4 --end 8
    python -m las_fast.attention --checkpoint runs/mine --data ROOT --utterance 1272-128104-0000

Each row is a character, and time runs to the right. Each word stands above the speech that the model attends to for it.
The text is the recognised text, or --text. An utterance of an archive of features is drawn below its normalised
features instead of a spectrogram.
"""

from __future__ import annotations

import argparse
import difflib
import math
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from las_fast.arguments import add_beam_options, add_device_option, as_file, as_path, as_recording, check_beam_options
from las_fast.cli import run
from las_fast.errors import InputError, show
from las_fast.files import DEFAULT_MODEL, prepare_output_file, write_atomically
from las_fast.options import Parser

if TYPE_CHECKING:  # importing torch would slow down --help
    import numpy as np
    from torch import Tensor

    from las_fast.data.corpus import Corpus, Utterance
    from las_fast.recogniser import Recogniser
    from las_fast.text import Vocabulary

MAX_SECONDS = 30.0  # of the part that a picture shows


class Picture(NamedTuple):
    """The contents of a picture; T is the number of feature frames of the part that is drawn, silence included."""

    text: str
    weights: np.ndarray  # (U, T) float32 attention of each character and of <eos>; NaN where silence was trimmed
    spectrogram: np.ndarray  # (T, mel bins) float32 log-mel; or (T, F) features of an archive, normalised
    frame_shift: float  # seconds between feature frames
    start: float  # seconds of the recording before the first frame
    sample_rate: int | None  # of the recording, in Hz; None for an archive of features


def parser() -> Parser:
    parser = Parser(
        prog="python -m las_fast.attention",
        description="Draw the attention of a model to a recording, below the spectrogram.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--checkpoint", metavar="RUN|FILE|NAME", help=f"run folder, file or released model (default: {DEFAULT_MODEL})"
    )
    parser.add_argument("file", nargs="?", type=as_recording, metavar="FILE", help="recording: wav, flac, ogg or mp3")
    parser.add_argument("--data", type=as_path, metavar="ROOT", help="instead of FILE: corpus with --utterance")
    parser.add_argument("--utterance", metavar="ID", help="id of an utterance of --data")
    parser.add_argument("--split", help="split of --data with the utterance (default: the only one that has it)")
    parser.add_argument(
        "--start", type=float, default=0.0, metavar="SECONDS", help="start of the part to draw (default: 0)"
    )
    parser.add_argument(
        "--end",
        type=float,
        metavar="SECONDS",
        help=f"its end, at most {MAX_SECONDS:g} s after --start (default: the end of the file)",
    )
    parser.add_argument(
        "--text", help="text whose attention to draw, in any case (default: the text that the model recognises)"
    )
    add_beam_options(parser)
    parser.add_argument(
        "--out",
        type=as_file,
        metavar="FILE.png",
        help="picture to write (default: FILE.attention.png or ID.attention.png in the current folder)",
    )
    add_device_option(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command; see --help."""
    options = parser().parse_args(argv)
    check_span(options.start, options.end)
    check_source(options)
    check_beam_options(options)
    name = options.file.name if options.file else options.utterance
    out = options.out or Path(f"{options.file.stem if options.file else Path(name).name}.attention.png")
    inputs = (options.file, options.checkpoint)
    prepare_output_file(out, "--out", what="a picture", suffixes=(".png",), inputs=inputs, may_replace=is_png)
    from las_fast.checkpoint import default_model
    from las_fast.output.figures import utterance_picture
    from las_fast.recogniser import load

    model = load(default_model() if options.checkpoint is None else options.checkpoint, device=options.device)
    if options.file:
        picture = make_picture(model, options.file, options.start, options.end, **spelling(options))
    else:
        picture = picture_of_utterance(model, options)
    title = f"{name}, {'given text' if options.text is not None else 'recognised text'}"
    draw = partial(
        utterance_picture,
        weights=picture.weights,
        spectrogram=picture.spectrogram,
        text=picture.text,
        title=show(title),
        frame_shift=picture.frame_shift,
        start=picture.start,
        sample_rate=picture.sample_rate,
    )
    write_atomically(out, draw)
    print(picture.text)
    print(f"written     {out}")


def spelling(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `attend` that choose the text."""
    return {"text": options.text, "beam": options.beam, "beam_threshold": options.beam_threshold}


def check_source(options: argparse.Namespace) -> None:
    """Raise InputError unless the options name one recording or utterance, and give the text or search for it."""
    named = [options.data, options.utterance]
    if options.file is None and None in named:
        raise InputError("give a recording, or an utterance of an archive by --data ROOT --utterance ID")
    if options.file is not None and named + [options.split] != [None] * 3:
        raise InputError(
            f"--data, --split and --utterance name an utterance, but the recording {show(options.file)} "
            "is given too; give one of them"
        )
    if options.text is not None and (options.beam is not None or options.beam_threshold is not None):
        raise InputError(
            "--beam and --beam-threshold are for the search for a text, but --text gives one; leave one of them out"
        )


def check_span(start: float, end: float | None) -> None:
    """Raise InputError unless --start and --end are finite, in order and at most MAX_SECONDS apart."""
    if not (math.isfinite(start) and start >= 0):
        raise InputError(f"--start must be at least 0 seconds; got {start:g}")
    if end is None:
        return
    if not (math.isfinite(end) and end > start):
        raise InputError(f"--end must be later than --start {start:g}; got {end:g}")
    if end - start > MAX_SECONDS:
        raise InputError(
            f"a picture shows at most {MAX_SECONDS:g} s; --start {start:g} --end {end:g} are {end - start:g} s"
        )


def is_png(path: Path) -> bool:
    """Return whether a file is a PNG of Matplotlib."""
    with path.open("rb") as file:
        start = file.read(256)
    return start.startswith(b"\x89PNG") and b"Matplotlib" in start


def make_picture(
    model: Recogniser,
    path: Path,
    start: float,
    end: float | None,
    *,
    text: str | None = None,
    beam: int | None = None,
    beam_threshold: float | None = None,
) -> Picture:
    """Compute the contents of a picture of a part of a recording.

    Args:
        start: of the part, in seconds.
        end:   of the part, in seconds; None for the end of the recording.
        text:  text for teacher forcing; None for the best hypothesis.
        beam, beam_threshold: of the search for the best hypothesis, as in Recogniser.transcribe.

    Raises:
        InputError: the recording cannot be read or is too long, the text has characters that the model lacks, or the
            beam or its threshold is out of range.
    """
    import numpy as np

    from las_fast.data.audio import load_audio
    from las_fast.data.features import compute_features, logmel_config, seconds_of, speech_features

    config = model.loaded.config.features
    if warning := model.features_warning():
        print(f"warning: {warning}", file=sys.stderr)
    samples = load_audio(path, config.sample_rate, start=start, seconds=None if end is None else end - start)
    check_length(path, len(samples) / config.sample_rate, start)
    ((features, spans),) = speech_features([samples], config)
    (spectrogram,) = compute_features([samples], logmel_config(config))
    tokens, weights = attend(model, features, text=text, beam=beam, beam_threshold=beam_threshold)
    columns = np.concatenate([np.arange(first, last) for first, last in spans])  # frames that were not trimmed
    drawn = per_column(model, weights, columns, len(spectrogram))
    shift = float(seconds_of(1, config))
    return Picture(model.loaded.vocabulary.decode(tokens), drawn, spectrogram.numpy(), shift, start, config.sample_rate)


def picture_of_utterance(model: Recogniser, options: argparse.Namespace) -> Picture:
    """Compute the contents of a picture of an utterance of --data; --start and --end count from its start.

    Raises:
        InputError: there is no such utterance, the model cannot take it, or make_picture raises it.
    """
    from las_fast.data.layouts import open_corpus
    from las_fast.splits import check_fits

    corpus = open_corpus(options.data)
    utterance = find_utterance(corpus, options.utterance, options.split)
    check_fits(corpus, model.loaded)
    if utterance.problem:
        raise InputError(utterance.problem)
    if corpus.kind == "features":
        return picture_of_features(model, corpus, utterance, options)
    start, end = utterance.start + options.start, None if options.end is None else utterance.start + options.end
    limit = utterance.span[1]
    if math.isfinite(limit):
        end = limit if end is None else min(end, limit)
    if end is not None and start >= end:
        raise starts_late(options.start, utterance, end - utterance.start)
    path = utterance.path.absolute()  # "-" would be standard input
    return make_picture(model, path, start, end, **spelling(options))


def find_utterance(corpus: Corpus, name: str, split: str | None) -> Utterance:
    """Return the utterance with that id; raise InputError if there is none, or if several splits have one."""
    splits = corpus.splits if split is None else corpus.resolve(split)
    listings = {one: {u.id: u for u in corpus.utterances(one)} for one in splits}
    holders = [one for one, utterances in listings.items() if name in utterances]
    if not holders:
        ids = [one for utterances in listings.values() for one in utterances]
        near = difflib.get_close_matches(name, ids, 1) or ids[:1]
        example = f", such as {show(near[0])}" if near else ""
        raise InputError(
            f"{show(corpus.root)} has no utterance {show(name)} in {', '.join(splits)}; give an id of these{example}"
        )
    if len(holders) > 1:
        raise InputError(f"the splits {' and '.join(holders)} each have an utterance {show(name)}; give one by --split")
    return listings[holders[0]][name]


def picture_of_features(
    model: Recogniser, corpus: Corpus, utterance: Utterance, options: argparse.Namespace
) -> Picture:
    """Compute the contents of a picture of an utterance whose features are in a file; see picture_of_utterance."""
    import numpy as np
    import torch

    from las_fast.data.normalisation import normalise
    from las_fast.data.readers import read_utterance

    config = model.loaded.config.features
    item = read_utterance(corpus, utterance, config)
    if item.frames is None:
        raise InputError(item.problem)
    shift = config.shift_ms / 1000
    first = round(options.start / shift)
    last = None if options.end is None else max(first + 1, round(options.end / shift))
    frames = torch.from_numpy(item.frames[first:last])
    if not len(frames):
        raise starts_late(options.start, utterance, item.seconds)
    check_length(utterance.id, len(frames) * shift, options.start)
    tokens, weights = attend(model, frames, **spelling(options))
    drawn = per_column(model, weights, np.arange(len(frames)), len(frames))
    shown = normalise(frames, config, model.loaded.statistics).numpy()
    return Picture(model.loaded.vocabulary.decode(tokens), drawn, shown, shift, first * shift, None)


def starts_late(start: float, utterance: Utterance, seconds: float) -> InputError:
    """Return the error about a --start after the end of an utterance of `seconds`."""
    return InputError(f"--start {start:g} is not before the end of {show(utterance.id)}, {seconds:.1f} s")


def check_length(name: str | Path, seconds: float, start: float) -> None:
    """Raise InputError if a part is longer than MAX_SECONDS."""
    if seconds > MAX_SECONDS:
        advice = f"give a part, such as --start {start:g} --end {start + 10:g}"
        raise InputError(f"a picture shows at most {MAX_SECONDS:g} s, but {show(name)} has {seconds:.1f} s; {advice}")


def per_column(model: Recogniser, weights: np.ndarray, columns: np.ndarray, count: int) -> np.ndarray:
    """Spread weights (U, encoder frames) over `count` columns, (U, count) float32, NaN where silence was removed.

    columns: (T,) the column of each feature frame that was kept.
    """
    import numpy as np

    drawn = np.full((len(weights), count), np.nan, np.float32)
    per_frame = np.repeat(weights, model.loaded.model.time_reduction, axis=1)
    known = min(len(columns), per_frame.shape[1])
    drawn[:, columns[:known]] = per_frame[:, :known]
    return drawn


def attend(
    model: Recogniser,
    features: Tensor,
    *,
    text: str | None,
    beam: int | None = None,
    beam_threshold: float | None = None,
) -> tuple[list[int], np.ndarray]:
    """Return the tokens of the text, and their attention weights with teacher forcing.

    Args:
        features: (N, F) feature frames before normalisation and deltas.
        text:     None for the best hypothesis of a search.
        beam, beam_threshold: of the search; None for those of the checkpoint's settings.

    Returns:
        tokens:  of the text, without <eos>.
        weights: (U, T) float32 over encoder frames, with a last row for <eos>.
    """
    import torch

    from las_fast.data.features import seconds_of
    from las_fast.data.normalisation import model_input
    from las_fast.search.dataset import Utterances
    from las_fast.text import EOS

    loaded, config = model.loaded, model.loaded.config.features
    inputs = model_input(features, config, loaded.statistics)
    if text is None:
        seconds = [seconds_of(len(inputs), config)]
        data = Utterances([features], ["the utterance"], seconds, config, loaded.statistics)
        setup = model.search_setup(model.settings(beam=beam, beam_threshold=beam_threshold).one_view())
        tokens = list(model.decode_dataset(data, setup, progress=False)[0][0].text_tokens)
    else:
        tokens = encode(text, loaded.vocabulary)
    with torch.inference_mode():
        memory = loaded.model.listen(inputs[None].to(model.device), torch.tensor([len(inputs)], device=model.device))
        _, weights = loaded.model.speller(memory, torch.tensor([[*tokens, EOS]], device=model.device))
    return tokens, weights[0].float().cpu().numpy()


def encode(text: str, vocabulary: Vocabulary) -> list[int]:
    """Convert --text to tokens, in the case of the vocabulary; raise InputError if that lacks some characters."""
    from las_fast.text import to_case

    text = to_case(text, vocabulary.characters)
    if unknown := vocabulary.unknown(text):
        raise InputError(
            f"--text has characters that the model does not know: {' '.join(map(repr, unknown))}; "
            f"it knows {vocabulary.characters!r}"
        )
    return vocabulary.encode(text)


if __name__ == "__main__":
    run(main)
