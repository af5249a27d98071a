"""Say in words what each picture of benchmarks/results/plots shows; benchmarks.report writes results/README.md."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

# Pictures that other commands write: what is to be seen, and the command.
OTHERS = {
    "attention-an4.png": (
        "Attention of `an4` over its training, on one dev utterance: nothing, the diagonal prior, the first alignment, "
        "and the released model.",
        "`python -m benchmarks.attention RUN@1 RUN@5 RUN@50 an4 --data AN4 --utterance 1 --out FILE`, where RUN is a "
        "training with `--training.validate-every 1`",
    ),
    "attention-english.png": (
        "Attention of the released `english` on a dev utterance, below its spectrogram.",
        "`python -m las_fast.attention --checkpoint english --data SPEECH --utterance 2830-3980-0044 --out FILE`",
    ),
    "beam-threshold.png": (
        "Change of the dev CER over the speed of the search, for values of `decoding.beam_threshold`.",
        "`python -m benchmarks.beam_threshold`",
    ),
    "learning-curve.png": (
        "Dev CER of the preset `speech13h` over hours of training speech, measured up to 16.7 and predicted up to 460.",
        "`python -m benchmarks.learning_curve`",
    ),
    "monitor.png": (
        "Dev loss over epochs of all recorded trainings, coloured by the monitor's verdict on the attention.",
        "`python -m benchmarks.recognition --table`",
    ),
    "serve-page.png": (
        "The web page of `las_fast.serve` with a transcript: waveform, words coloured by confidence, attention.",
        "hand in Chromium",
    ),
}


class Entry(NamedTuple):
    """A picture that benchmarks.report draws."""

    name: str  # of its file
    title: str
    sentence: str  # what is to be seen


def index(entries: Iterable[Entry], machine: str) -> str:
    """Return the page: each picture with its sentence, first those of measurements."""
    lines = [
        "# What do the pictures show?",
        "",
        "Written by `python -m benchmarks.report`, like the pictures of measurements, from the rows in this folder.",
        "[benchmarks](../README.md) says what was compared and how.",
        "",
        f"## Measurements on {machine}",
        "",
        "Times are CPU time on one thread, and wall-clock time on several. Without a precision, a path is in float32.",
        "",
        *(f"- [{_capital(title)}](plots/{name}). {sentence}" for name, title, sentence in entries),
        "",
        "## Attention, trainings and the page",
        "",
        *(f"- [{name}](plots/{name}). {sentence} Made by {how}." for name, (sentence, how) in OTHERS.items()),
    ]
    return "\n".join(lines) + "\n"


def _capital(title: str) -> str:
    """Return a title that starts with a capital."""
    first, space, rest = title.partition(" ")
    return f"{ {'ctc': 'CTC', 'bilstm': 'BiLSTM'}.get(first, first.capitalize()) }{space}{rest}"
