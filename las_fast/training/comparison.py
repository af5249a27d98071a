"""The report of several runs: a figure per value with a curve per run, and a table of the settings that differ."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from las_fast.errors import InputError
from las_fast.output.figures import Curve, legend
from las_fast.output.mistakes import DecodedSplit, figure
from las_fast.training.report import (
    NOTHING_DECODED,
    attention_figure,
    decoding_sections,
    headline,
    number,
    origins,
    peak_gib,
    points,
    settings,
    smooth,
    train_speed,
    write_page,
)
from las_fast.training.runs import Run, open_runs, read_attention
from las_fast.tree import flatten, to_tree

COLOURS = 8  # classes line1 to line8 of the page
STYLES = [f"line{i}{pattern}" for pattern in ("", " dashed", " dotted") for i in range(1, COLOURS + 1)]


def write_comparison(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    title: str,
    decoded: DecodedSplit = NOTHING_DECODED,
) -> None:
    """Write the report of several trainings as one HTML file; see write_report.

    Raises:
        InputError: as write_report, or a run is given twice, or there are more runs than STYLES.
    """
    if len(paths) > len(STYLES):
        raise InputError(f"a comparison has colours and dashes for {len(STYLES)} runs; got {len(paths)}; give fewer")
    runs = open_runs(paths)
    body = [
        f"<h1>{html.escape(title)}</h1>",
        headline(decoded.results) if decoded.results else "",
        _summary(runs),
        _curves(runs),
        _differences(runs),
        _attention(runs),
        *decoding_sections(decoded),
        origins(runs),
        settings(runs),
    ]
    write_page(out, title, body)


def _summary(runs: Sequence[Run]) -> str:
    heads = ["epochs", "best dev CER", "at epoch", "WER", "attention formed", "speed", "memory, GiB", "core hours"]
    lines = ["<tr><th>run</th>" + "".join(f'<th class="rate">{head}</th>' for head in heads) + "</tr>"]
    for run, style in zip(runs, STYLES, strict=False):
        name = f'<td class="name"><i class="swatch {style}"></i>{html.escape(run.name)}</td>'
        lines.append(f"<tr>{name}" + "".join(f'<td class="rate">{cell}</td>' for cell in _cells(run)) + "</tr>")
    return f'<h2>Runs</h2><div class="wide"><table>{"".join(lines)}</table></div>'


def _cells(run: Run) -> list[str]:
    best, speed = run.best or {}, train_speed(run)
    epochs = max((row["epoch"] for row in run.log if "epoch" in row), default=0)
    hours = run.valid[-1].get("core_hours") if run.valid else None
    formed = "no" if run.formed_epoch is None else f"epoch {run.formed_epoch:g}"
    return [
        f"{round(epochs, 1):g}",
        f"{best['cer']:.2f} %" if best else "",
        f"{best['epoch']:g}" if best else "",
        f"{best['wer']:.2f} %" if best.get("wer") is not None else "",
        formed,
        f"{speed:,.0f} ×" if speed is not None else "",
        number(peak_gib(run)),
        number(hours),
    ]


def _curves(runs: Sequence[Run]) -> str:
    """Return a figure per value with the curves of all runs, and one legend for all figures."""
    kinds = (
        ("Dev CER, percent, greedy, at most 100", "valid", "cer", lambda cer: min(cer, 100.0)),
        ("Dev loss of the speller, nats per token", "valid", "loss", float),
        ("Training loss of the speller, nats per token", "train", "attention", float),
        ("Learning rate, thousandths", "train", "lr", lambda rate: 1000 * rate),
    )
    figures = ""
    for title, part, key, convert in kinds:
        curves = [_curve(run, style, part, key) for run, style in zip(runs, STYLES, strict=False)]
        drawn = [replace(curve, y=list(map(convert, curve.y))) for curve in curves if curve.x]
        figures += figure(title, drawn, x_label="epoch", show_legend=False) if drawn else ""
    names = legend([Curve(run.name, style, [], []) for run, style in zip(runs, STYLES, strict=False)])
    return f'<h2>Training</h2>{names}<div class="pair">{figures}</div>'


def _curve(run: Run, style: str, part: str, key: str) -> Curve:
    return points(run.name, style, run.valid, key) if part == "valid" else smooth(run.name, style, run.train, key)


def differing_settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the settings that differ, each with its value in every run; "" if the value is unknown."""
    flat = [
        {name: _text(value) for name, value in flatten(to_tree(run.config))} if run.config else None for run in runs
    ]
    known = [tree for tree in flat if tree is not None]
    names = dict.fromkeys(name for tree in known for name in tree)
    differing = [name for name in names if len({tree.get(name, "") for tree in known}) > 1]
    return {name: [tree.get(name, "") if tree is not None else "" for tree in flat] for name in differing}


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_text(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_text, value)) + "]"
    return str(value)


def _differences(runs: Sequence[Run]) -> str:
    without = [run.name for run in runs if run.config is None]
    note = f"<p>The settings of {html.escape(', '.join(without))} are unknown.</p>" if without else ""
    table = differing_settings(runs)
    if not table:
        return f"<h2>Different settings</h2>{note or '<p>All settings are equal.</p>'}"
    names = "".join(f'<th class="name">{html.escape(run.name)}</th>' for run in runs)
    lines = [f"<tr><th>setting</th>{names}</tr>"]
    for name, values in table.items():
        cells = "".join(f"<td>{html.escape(value)}</td>" for value in values)
        lines.append(f'<tr><td class="name">{html.escape(name)}</td>{cells}</tr>')
    return f'<h2>Different settings</h2>{note}<div class="wide"><table>{"".join(lines)}</table></div>'


def _attention(runs: Sequence[Run]) -> str:
    """Return the section with the last attention of each run, of the same utterance if all runs have drawn one."""
    last = [(run, *read_attention(run.attention_files[-1])) for run in runs if run.attention_files]
    drawn = [[name for name, *_ in pictures] for *_, pictures in last]
    shared = next((name for name in drawn[0] if all(name in names for names in drawn)), None) if drawn else None
    figures = []
    for run, epoch, pictures in last:
        chosen = [picture for picture in pictures if shared in (None, picture[0])]
        for name, text, weights in chosen[:1]:
            when = f"{run.name}, epoch {epoch:g}" + ("" if shared is not None else f", {name}")
            figures.append(attention_figure(name, text, weights, when, run.frame_seconds))
    if not figures:
        return ""
    caption = f'<p class="text">{html.escape(shared)}</p>' if shared is not None else ""
    intro = "<p>At the last validation of each run. All pictures have the same colours, from 0 to 1.</p>"
    return f'<h2>Attention</h2>{intro}{caption}<div class="trio">{"".join(figures)}</div>'
