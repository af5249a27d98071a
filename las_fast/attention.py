"""python -m las_fast.attention: draw what a model attends to while it spells a recording, below its spectrogram.

    python -m las_fast.attention --checkpoint speech13h talk.flac --start 4 --end 8

The picture has the characters as rows and seconds as columns. The words stand above, where the model attended to them.
By default the text is the model's own; --text gives another.
"""

from __future__ import annotations

import math
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from las_fast.cli import run
from las_fast.errors import InputError, show
from las_fast.files import prepare_output_file, write_atomically
from las_fast.options import Parser, as_file, as_recording

if TYPE_CHECKING:  # importing torch would slow down --help
    import numpy as np

    from las_fast.recogniser import Recogniser

MAX_SECONDS = 30.0  # of one picture


class Picture(NamedTuple):
    """What is drawn of a recording. Columns are feature frames of the recording."""

    text: str
    weights: np.ndarray  # (U, T) float32 attention of each character and of <eos>; NaN where silence was trimmed
    spectrogram: np.ndarray  # (T, mel bins) float32 log-mel
    frame_seconds: float  # between columns
    start: float  # of the first column, in seconds of the recording


def parser() -> Parser:
    parser = Parser(
        prog="python -m las_fast.attention",
        description="Draw what a model attends to while it spells a recording, below its spectrogram.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="RUN|FILE|NAME", help="run folder, file or released model"
    )
    parser.add_argument("file", type=as_recording, metavar="FILE", help="recording: wav, flac, ogg or mp3")
    parser.add_argument("--start", type=float, default=0.0, metavar="SECONDS", help="start of the part (default: 0)")
    parser.add_argument(
        "--end", type=float, metavar="SECONDS", help=f"its end, at most {MAX_SECONDS:g} s later (default: the file's)"
    )
    parser.add_argument("--text", help="text to spell (default: what the model recognises)")
    parser.add_argument("--beam", type=int, help="beam width; 1 is greedy (default: the checkpoint's)")
    parser.add_argument(
        "--out", type=as_file, metavar="FILE.png", help="picture to write (default: FILE.attention.png, here)"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (default: cuda if available)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command; see --help."""
    options = parser().parse_args(argv)
    check_span(options.start, options.end)
    out = options.out or Path(f"{options.file.stem}.attention.png")
    inputs = (options.file, options.checkpoint)
    prepare_output_file(out, "--out", what="a picture", suffixes=(".png",), inputs=inputs, may_replace=is_png)
    from las_fast.output.figures import utterance_picture
    from las_fast.recogniser import load

    model = load(options.checkpoint, device=options.device)
    picture = look(model, options.file, options.start, options.end, text=options.text, beam=options.beam)
    title = f"{options.file.name}, {'given text' if options.text is not None else 'recognised text'}"
    draw = partial(
        utterance_picture,
        weights=picture.weights,
        spectrogram=picture.spectrogram,
        text=picture.text,
        title=show(title),
        frame_seconds=picture.frame_seconds,
        start=picture.start,
        sample_rate=model.loaded.config.features.sample_rate,
    )
    write_atomically(out, draw)
    print(picture.text)
    print(f"written     {out}")


def check_span(start: float, end: float | None) -> None:
    """Raise InputError if --start and --end are no part of a recording, or too far apart for one picture."""
    if not (math.isfinite(start) and start >= 0):
        raise InputError(f"--start must be a number of seconds from 0 on; got {start:g}")
    if end is None:
        return
    if not (math.isfinite(end) and end > start):
        raise InputError(f"--end must be later than --start {start:g}; got {end:g}")
    if end - start > MAX_SECONDS:
        raise InputError(
            f"a picture shows at most {MAX_SECONDS:g} s; --start {start:g} --end {end:g} are {end - start:g} s"
        )


def is_png(path: Path) -> bool:
    """Return whether a file is a PNG."""
    with path.open("rb") as file:
        return file.read(4) == b"\x89PNG"


def look(
    model: Recogniser, path: Path, start: float, end: float | None, *, text: str | None = None, beam: int | None = None
) -> Picture:
    """Compute what is drawn of a part of a recording.

    Args:
        start, end: of the part in seconds; end None is the end of the recording.
        text:       text to spell with teacher forcing; None for the best hypothesis.
        beam:       beam width of the search for it; by default that of the checkpoint's settings.

    Raises:
        InputError: the recording cannot be read or is too long, or the text has characters that the model lacks.
    """
    import numpy as np

    from las_fast.data.audio import load_audio
    from las_fast.data.features import compute_features, logmel_config, seconds_of, speech_features

    config = model.loaded.config.features
    samples = load_audio(path, config.sample_rate, start=start, seconds=None if end is None else end - start)
    seconds = len(samples) / config.sample_rate
    if seconds > MAX_SECONDS:
        advice = f"give a part, such as --start {start:g} --end {start + 10:g}"
        raise InputError(f"{show(path)} has {seconds:.1f} s, and a picture shows at most {MAX_SECONDS:g}; {advice}")
    ((features, spans),) = speech_features([samples], config)
    (spectrogram,) = compute_features([samples], logmel_config(config))
    tokens, weights = spell(model, features, text=text, beam=beam)
    columns = np.concatenate([np.arange(first, last) for first, last in spans])  # frame of the recording
    drawn = np.full((len(weights), len(spectrogram)), np.nan, np.float32)
    per_frame = np.repeat(weights, model.loaded.model.time_reduction, axis=1)
    count = min(len(columns), per_frame.shape[1])
    drawn[:, columns[:count]] = per_frame[:, :count]
    spelled = model.loaded.vocabulary.decode(tokens)
    return Picture(spelled, drawn, spectrogram.numpy(), float(seconds_of(1, config)), start)


def spell(model: Recogniser, features, *, text: str | None, beam: int | None) -> tuple[list[int], np.ndarray]:
    """Return the tokens of the text and their attention weights (U, T) float32, <eos> included, with teacher forcing.

    features: frames (T, F) as in training, before normalisation.
    """
    import torch

    from las_fast.data.features import add_deltas, seconds_of
    from las_fast.data.normalisation import normalise
    from las_fast.search.dataset import Utterances
    from las_fast.text import EOS

    loaded, config = model.loaded, model.loaded.config.features
    known = loaded.info.get("data", {})
    if known.get("kind") == "features":
        message = f"was trained on the features of {known.get('name')}; those that las_fast computes may differ"
        print(f"warning: checkpoint {loaded.path} {message}", file=sys.stderr)
    inputs = add_deltas(normalise(features, config, loaded.statistics), config.deltas)
    if text is None:
        data = Utterances([inputs], ["the recording"], [seconds_of(len(inputs), config)])
        decoder = model.decoder(model.settings(beam=beam))
        tokens = list(model.decode_dataset(data, decoder, progress=False)[0][0].text_tokens)
    else:
        tokens = encode(text, loaded.vocabulary)
    with torch.inference_mode():
        memory = loaded.model.listen(inputs[None].to(model.device), torch.tensor([len(inputs)], device=model.device))
        _, weights = loaded.model.speller(memory, torch.tensor([[*tokens, EOS]], device=model.device))
    return tokens, weights[0].float().cpu().numpy()


def encode(text: str, vocabulary) -> list[int]:
    """Convert the text of --text to tokens; raise InputError if the model lacks some of its characters."""
    if unknown := vocabulary.unknown(text):
        raise InputError(
            f"--text has characters that the model does not know: {' '.join(map(repr, unknown))}; "
            f"it knows {vocabulary.characters!r}"
        )
    return vocabulary.encode(text)


if __name__ == "__main__":
    run(main)
