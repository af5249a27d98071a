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


def attention_picture(
    path: str | Path, weights: np.ndarray, text: str, title: str, *, frame_seconds: float | None = None
) -> None:
    """Write a PNG of attention weights: characters top to bottom, encoder frames left to right.

    Args:
        path:          output file; the suffix does not matter.
        weights:       (U, T) float32; U is len(text), or one more with <eos>.
        frame_seconds: duration of an encoder frame; the axis then shows seconds instead of frames.
    """
    with open(path, "wb") as file:
        draw_attention(file, weights, text, title, frame_seconds=frame_seconds)


def draw_attention(
    file: BinaryIO, weights: np.ndarray, text: str, title: str, *, frame_seconds: float | None, in_page: bool = False
) -> None:
    """Write the PNG of attention_picture to an open file; in_page: smaller, transparent, without a title."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    weights = np.asarray(weights, dtype=np.float32)
    tokens, frames = weights.shape
    size = (4.2 if in_page else 6.4, min(12.0, max(2.2, 1.1 + 0.15 * tokens)))
    figure = Figure(figsize=size, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(
        weights, aspect="auto", interpolation="nearest", cmap="magma", vmin=0.0, vmax=max(float(weights.max()), 1e-6),
        extent=(0.0, frames * (frame_seconds or 1.0), tokens - 0.5, -0.5),
    )  # fmt: skip
    label_tokens(axes, text, tokens, fontsize=7)
    axes.set_xlabel("seconds" if frame_seconds else "encoder frame")
    if in_page:
        _make_transparent(figure, axes)
    else:
        figure.colorbar(image, ax=axes, pad=0.01)
        axes.set_title(title, fontsize=9)
    canvas.print_figure(file, format="png", dpi=130 if in_page else 110, facecolor=figure.get_facecolor())


def label_tokens(axes, text: str, tokens: int, *, fontsize: float) -> None:
    """Label the `tokens` rows of an attention picture with the characters of text and <eos>."""
    labels = [*("␣" if c == " " else c for c in text), "<eos>"][:tokens]
    every = -(-tokens // 80)  # long transcripts: label only every second, third, ... row
    axes.set_yticks(range(0, len(labels), every), labels[::every], fontsize=fontsize, family="monospace")


def _make_transparent(figure, axes) -> None:
    figure.set_facecolor("none")
    axes.tick_params(colors=GREY)
    axes.xaxis.label.set_color(GREY)
    for spine in axes.spines.values():
        spine.set_edgecolor(GREY)


@dataclass(frozen=True)
class Curve:
    """A named line through points; `style` is a CSS class of the report: line1, line2 or line3."""

    name: str
    style: str
    x: Sequence[float]
    y: Sequence[float]


def curves_svg(curves: Sequence[Curve], *, x_label: str, y_label: str, mark: tuple[float, str] | None = None) -> str:
    """Draw curves as SVG in the colours of the report; mark: (x, name) of a vertical line."""
    points = [(x, y) for c in curves for x, y in zip(c.x, c.y, strict=True) if math.isfinite(y)]
    if not points:
        return "<p>No values were logged.</p>"
    width, height, left, bottom, top, right = 560, 300, 48, 40, 34, 12
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
        line = [(to_x(x), to_y(y)) for x, y in zip(curve.x, curve.y, strict=True) if math.isfinite(y)]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in line)
        parts.append(f'<path class="curve {curve.style}" d="M{path}"/>')
        if len(line) <= 60:
            parts += [f'<circle class="dot {curve.style}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in line]
    parts += _legend(curves, left)
    parts.append(f'<text class="tick" x="{(left + width) / 2}" y="{height - 6}" text-anchor="middle">{x_label}</text>')
    return "".join(parts) + "</svg>"


def _mark(x: float, name: str, top: int, bottom: int, *, flip: bool) -> list[str]:
    anchor, offset = ("end", -5) if flip else ("start", 5)
    return [
        f'<path class="mark" d="M{x:.1f} {top}V{bottom}"/>',
        f'<text class="tick" x="{x + offset:.1f}" y="{top + 12}" text-anchor="{anchor}">{html.escape(name)}</text>',
    ]


def _legend(curves: Sequence[Curve], left: int) -> list[str]:
    parts, x = [], left
    for curve in curves:
        parts.append(f'<path class="curve {curve.style}" d="M{x} 14H{x + 18}"/>')
        parts.append(f'<text class="tick" x="{x + 23}" y="18">{html.escape(curve.name)}</text>')
        x += 44 + int(6.6 * len(curve.name))
    return parts


def _ticks(maximum: float) -> list[float]:
    """Return about five round numbers from 0 to `maximum` or just above."""
    maximum = max(maximum, 1e-9)
    magnitude = 10.0 ** math.floor(math.log10(maximum / 4))
    step = next(m for m in (magnitude * f for f in (1, 2, 2.5, 5, 10)) if maximum / m <= 5)
    return [round(i * step, 12) for i in range(math.ceil(maximum / step - 1e-9) + 1)]
