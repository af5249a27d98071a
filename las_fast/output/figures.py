"""Pictures: attention as PNG, curves as SVG."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

GREY = "#808080"  # readable on white and on black
MAX_DOTS = 60  # longer curves are drawn without dots


def attention_picture(
    path: str | Path, weights: np.ndarray, text: str, title: str, *, frame_seconds: float | None = None
) -> None:
    """Write a PNG of attention weights: characters from top to bottom, encoder frames from left to right.

    The colours range from 0 to 1 in every picture, so that pictures of different epochs can be compared.

    Args:
        path:          output file; the suffix does not matter.
        weights:       (U, T) float32; U is len(text), or one more with <eos>.
        text:          one character per row.
        title:         above the picture.
        frame_seconds: seconds per encoder frame; the axis then shows seconds instead of frames.
    """
    with open(path, "wb") as file:
        draw_attention(file, weights, text, title, frame_seconds=frame_seconds)


def draw_attention(
    file: BinaryIO, weights: np.ndarray, text: str, title: str, *, frame_seconds: float | None, in_page: bool = False
) -> None:
    """Write the PNG of attention_picture to an open file.

    in_page: for a report: smaller, transparent, without title and colour bar.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    weights = np.asarray(weights, dtype=np.float32)
    tokens, frames = weights.shape
    size = (4.2 if in_page else 6.4, min(12.0, max(2.2, 1.1 + 0.15 * tokens)))
    figure = Figure(figsize=size, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(
        weights, aspect="auto", interpolation="nearest", cmap="magma", vmin=0.0, vmax=1.0,
        extent=(0.0, frames * (frame_seconds or 1.0), tokens - 0.5, -0.5),
    )  # fmt: skip
    label_tokens(axes, text, tokens, fontsize=7)
    axes.set_xlabel("seconds" if frame_seconds else "encoder frame")
    if in_page:
        _make_transparent(figure, axes)
    else:
        figure.colorbar(image, ax=axes, pad=0.01, fraction=0.03, aspect=40, label="attention weight")
        axes.set_title(title, fontsize=9, parse_math=False)
    canvas.print_figure(file, format="png", dpi=130 if in_page else 110, facecolor=figure.get_facecolor())


def utterance_picture(
    path: str | Path,
    *,
    weights: np.ndarray,
    spectrogram: np.ndarray,
    text: str,
    title: str,
    frame_shift: float,
    start: float,
    sample_rate: int | None,
) -> None:
    """Write a PNG of a spectrogram, and below it the attention weights on the same axis in seconds.

    Args:
        path:          output file; the suffix does not matter.
        weights:       (U, T) float32; U is one more than len(text), for <eos>; NaN is left blank.
        spectrogram:   (T, mel bins) float32 log-mel, or (T, F) other features.
        text:          one character per row of weights; its words are written above the spectrogram.
        title:         above the picture.
        frame_shift:   seconds per column.
        start:         seconds of the recording before the first column.
        sample_rate:   Hz that the mel bins were computed for; None for other features.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tokens, frames = weights.shape
    below = min(12.0, max(2.0, 0.14 * tokens))
    width = min(16.0, max(7.0, 2.0 + 1.2 * frames * frame_shift))
    figure = Figure(figsize=(width, below + 3.0), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, sharex=True, height_ratios=[1.8, below])
    end = start + frames * frame_shift
    _draw_spectrogram(upper, spectrogram, (start, end), sample_rate)
    image = lower.imshow(
        weights, aspect="auto", interpolation="nearest", cmap="magma", vmin=0.0, vmax=1.0,
        extent=(start, end, tokens - 0.5, -0.5),
    )  # fmt: skip
    label_tokens(lower, text, tokens, fontsize=7)
    lower.set_xlabel("seconds")
    figure.colorbar(image, ax=lower, pad=0.01, fraction=0.03, aspect=40, label="attention weight")
    _label_words(upper, attended_times(weights, text, frame_shift, start), (start, end))
    figure.suptitle(title, fontsize=9, parse_math=False)
    canvas.print_figure(path, format="png", dpi=110, facecolor=figure.get_facecolor())


def _draw_spectrogram(axes, spectrogram: np.ndarray, span: tuple[float, float], sample_rate: int | None) -> None:
    from las_fast.data.features import filter_centres  # imports torch

    low, high = np.percentile(spectrogram, (5, 99.5))
    bins = spectrogram.shape[1]
    axes.imshow(
        spectrogram.T, aspect="auto", origin="lower", cmap="Greys", vmin=low, vmax=max(high, low + 1e-6),
        extent=(*span, -0.5, bins - 0.5),
    )  # fmt: skip
    if sample_rate is None:
        axes.tick_params(axis="y", labelsize=7)
        axes.set_ylabel("feature, normalised")
        return
    centres = filter_centres(bins, sample_rate).numpy()
    shown = [hertz for hertz in (250, 500, 1000, 2000, 4000, 8000) if centres[0] <= hertz <= centres[-1]]
    axes.set_yticks(np.interp(shown, centres, np.arange(bins)), [f"{hertz / 1000:g}" for hertz in shown], fontsize=7)
    axes.set_ylabel("kHz")


def attended_times(weights: np.ndarray, text: str, frame_shift: float, start: float) -> list[tuple[str, float]]:
    """Return (word, time in seconds) of each word: the mean over its characters of the time that each attends to."""
    known = np.nan_to_num(weights)
    centres = start + (np.arange(known.shape[1]) + 0.5) * frame_shift
    attended = known @ centres / np.maximum(known.sum(1), 1e-12)  # (U,)
    result, first = [], 0
    for word in text.split(" "):
        if word:
            result.append((word, float(attended[first : first + len(word)].mean())))
        first += len(word) + 1
    return result


def _label_words(axes, words: Sequence[tuple[str, float]], span: tuple[float, float]) -> None:
    """Write words above the axes at their times."""
    above = axes.secondary_xaxis("top")
    inside = [(word, min(max(time, span[0]), span[1])) for word, time in words]
    above.set_xticks([time for _, time in inside], [word for word, _ in inside], fontsize=8, rotation=40, ha="left",
                     parse_math=False)  # fmt: skip


def label_tokens(axes, text: str, tokens: int, *, fontsize: float) -> None:
    """Label the rows of an attention picture, as many as `tokens`, with the characters of text and <eos>."""
    labels = [*("␣" if c == " " else c for c in text), "<eos>"][:tokens]
    every = -(-tokens // 80)  # long texts: label only every second, third, ... row
    axes.set_yticks(range(0, len(labels), every), labels[::every], fontsize=fontsize, family="monospace")


def _make_transparent(figure, axes) -> None:
    figure.set_facecolor("none")
    axes.tick_params(colors=GREY)
    axes.xaxis.label.set_color(GREY)
    for spine in axes.spines.values():
        spine.set_edgecolor(GREY)


@dataclass(frozen=True)
class Curve:
    """A named line through points."""

    name: str
    style: str  # CSS classes of the report: line1 to line8, dashed, dotted
    x: Sequence[float]
    y: Sequence[float]  # from 0 on; points that are not finite are left out
    is_line: bool = True  # otherwise only dots are drawn


def curves_svg(curves: Sequence[Curve], *, x_label: str, y_label: str, mark: tuple[float, str] | None = None) -> str:
    """Return curves as SVG with the CSS classes of the report, or a paragraph if they have no points.

    mark: (x, name) of a vertical line.
    """
    points = [(x, y) for c in curves for x, y in zip(c.x, c.y, strict=True) if math.isfinite(y)]
    if not points:
        return "<p>No values were logged.</p>"
    width, height, left, bottom, top, right = 560, 300, 48, 40, 14, 12
    x_max = max(x for x, _ in points) or 1.0
    y_ticks = _ticks(max(y for _, y in points))
    y_max = y_ticks[-1]

    def to_x(x: float) -> float:
        return left + (width - left - right) * x / x_max

    def to_y(y: float) -> float:
        return height - bottom - (height - bottom - top) * y / y_max

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(y_label)}">']
    for y in y_ticks:
        parts.append(f'<path class="grid" d="M{left} {to_y(y):.1f}H{width - right}"/>')
        parts.append(f'<text class="tick" x="{left - 6}" y="{to_y(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    tick_y = height - bottom + 16
    for x in (t for t in _ticks(x_max) if t <= x_max):
        parts.append(f'<text class="tick" x="{to_x(x):.1f}" y="{tick_y}" text-anchor="middle">{x:g}</text>')
    if mark:
        parts += _mark(to_x(min(mark[0], x_max)), mark[1], top, height - bottom, flip=mark[0] > 0.6 * x_max)
    for curve in curves:
        parts += _draw_curve(
            curve, [(to_x(x), to_y(y)) for x, y in zip(curve.x, curve.y, strict=True) if math.isfinite(y)]
        )
    parts.append(f'<text class="tick" x="{(left + width) / 2}" y="{height - 6}" text-anchor="middle">{x_label}</text>')
    return "".join(parts) + "</svg>"


def _draw_curve(curve: Curve, line: list[tuple[float, float]]) -> list[str]:
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in line)
    parts = [f'<path class="curve {curve.style}" d="M{path}"/>'] if curve.is_line and line else []
    if len(line) <= MAX_DOTS or not curve.is_line:
        parts += [f'<circle class="dot {curve.style}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in line]
    return parts


def _mark(x: float, name: str, top: int, bottom: int, *, flip: bool) -> list[str]:
    anchor, offset = ("end", -5) if flip else ("start", 5)
    return [
        f'<path class="mark" d="M{x:.1f} {top}V{bottom}"/>',
        f'<text class="tick" x="{x + offset:.1f}" y="{top + 12}" text-anchor="{anchor}">{html.escape(name)}</text>',
    ]


def legend(curves: Sequence[Curve]) -> str:
    """Return the names and colours of the curves as HTML; unlike text in SVG, it wraps on a narrow screen."""
    names = ""
    for curve in curves:
        kind = "" if curve.is_line else " point"
        names += f'<span><i class="swatch {curve.style}{kind}"></i>{html.escape(curve.name)}</span>'
    return f'<p class="legend">{names}</p>'


def _ticks(maximum: float) -> list[float]:
    """Return about five round numbers from 0 on; the last is at least `maximum`."""
    maximum = max(maximum, 1e-9)
    magnitude = 10.0 ** math.floor(math.log10(maximum / 4))
    step = next(m for m in (magnitude * f for f in (1, 2, 2.5, 5, 10)) if maximum / m <= 5)
    return [round(i * step, 12) for i in range(math.ceil(maximum / step - 1e-9) + 1)]
