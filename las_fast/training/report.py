"""The report of one run: a single HTML file with a light and a dark theme."""

from __future__ import annotations

import base64
import html
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from las_fast.files import first_line, write_text_atomically
from las_fast.output.figures import Curve, draw_attention
from las_fast.output.mistakes import DecodedSplit, confusions, error_curves, figure, utterances
from las_fast.training.monitor import THRESHOLDS
from las_fast.training.runs import Run, epoch_of, open_runs, read_attention

TEMPLATE = Path(__file__).with_name("report.html")  # with @title@ and @body@
MAX_PICTURES = 6  # of the attention over epochs
NOTHING_DECODED = DecodedSplit()


def write_report(
    run: str | Path,
    out: str | Path,
    *,
    title: str,
    decoded: DecodedSplit = NOTHING_DECODED,
) -> None:
    """Write the report of a training as one HTML file.

    Args:
        run:     run folder, with log.jsonl and perhaps config.yaml, attention/ and starts.jsonl.
        out:     the HTML file.
        title:   heading of the page.
        decoded: split that the model decoded. Without results, the headline has those of the best validation.

    Raises:
        InputError: run is not a run folder, its attention is damaged, or out cannot be written.
    """
    (opened,) = open_runs([run])
    body = [
        f"<h1>{html.escape(title)}</h1>",
        headline(decoded.results) if decoded.results else headline(run_results(opened), "dev, greedy"),
        _training(opened),
        _attention(opened),
        *decoding_sections(decoded),
        _speed(opened),
        _validations(opened),
        origins([opened]),
        settings([opened]),
    ]
    write_page(out, title, body)


def write_page(out: str | Path, title: str, body: Sequence[str]) -> None:
    """Write the sections of a report as one HTML file."""
    template = TEMPLATE.read_text(encoding="utf-8")
    page = template.replace("@title@", html.escape(title)).replace("@body@", "\n".join(filter(None, body)))
    write_text_atomically(out, page)


def is_report(path: Path) -> bool:
    """Return whether a file is a report of las_fast, from its first line."""
    return first_line(path) == TEMPLATE.read_text(encoding="utf-8").partition("\n")[0]


def decoding_sections(decoded: DecodedSplit) -> list[str]:
    """Return the sections on a decoded split; [] if it has no utterances."""
    rows = decoded.utterances
    return [utterances(rows, decoded.audio), confusions(rows), error_curves(rows)] if rows else []


# ----------------------------------------------------------------------------------------------------------- Headline


def run_results(run: Run) -> dict:
    """Return the results for the headline of a training: its best validation, epochs, speed and memory."""
    best, epochs = run.best, [row["epoch"] for row in run.log if "epoch" in row]
    results = {name: best.get(name) for name in ("cer", "wer", "ld", "utterances")} if best else {}
    return results | {"epochs": max(epochs, default=None), "train_speed": train_speed(run), "peak_gib": peak_gib(run)}


def train_speed(run: Run) -> float | None:
    """Return the median training speed in seconds of audio per second; None if none was logged."""
    speeds = [row["speed"] for row in run.train if isinstance(row.get("speed"), int | float)]
    return statistics.median(speeds) if speeds else None


def peak_gib(run: Run) -> float | None:
    """Return the largest logged peak memory of the training process in GiB; None if none was logged."""
    return max((row["peak_gib"] for row in run.valid if isinstance(row.get("peak_gib"), int | float)), default=None)


def headline(results: Mapping[str, float | None], source: str = "") -> str:
    """Return a tile for each known result.

    source: what the results are of, if not of the decoded split, such as "dev, greedy".
    """
    metrics = [
        ("cer", "CER", "{:.2f} %", source or "character edits per reference character"),
        ("wer", "WER", "{:.2f} %", source or "word edits per reference word"),
        ("ld", "LD", "{:.2f}", source or "character edits per utterance"),
        ("utterances", "utterances", "{:,}", "in the dev set" if source else "decoded"),
        ("rtfx", "speed", "{:,.0f} ×", "faster than real time, decoding"),
        ("epochs", "epochs", "{:g}", "trained"),
        ("train_speed", "speed", "{:,.0f} ×", "faster than real time, training"),
        ("peak_gib", "memory", "{:.1f} GiB", "peak of the training process"),
    ]
    tiles = [
        f'<div class="tile"><b>{form.format(results[key])}</b><span>{name}</span><small>{unit}</small></div>'
        for key, name, form, unit in metrics
        if results.get(key) is not None
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>'


# ------------------------------------------------------------------------------------------------------------- Curves


def _training(run: Run) -> str:
    formed = run.formed_epoch
    mark = None if formed is None else (formed, f"attention formed, epoch {formed:g}")
    verdict = "has not formed" if formed is None else f"had formed by epoch {formed:g}"
    losses = [
        smooth("training, all parts", "line3", run.train, "loss"),
        smooth("training, speller", "line1", run.train, "attention"),
        points("dev, speller", "line2", run.valid, "loss"),
    ]
    rates = [points("dev CER", "line1", run.valid, "cer"), points("dev WER", "line2", run.valid, "wer")]
    figures = ""
    for name, curves in (("Loss, nats per token", losses), ("Dev error, percent, greedy", rates)):
        figures += figure(name, [c for c in curves if c.x], x_label="epoch", mark=mark)
    return f'<h2>Training</h2><p>The attention {verdict}.</p><div class="pair">{figures}</div>'


def points(name: str, style: str, rows: list[dict], key: str) -> Curve:
    """Return the finite values of `key` in log rows over their epochs."""
    values = [(r["epoch"], r[key]) for r in rows if isinstance(r.get(key), int | float) and math.isfinite(r[key])]
    return Curve(name, style, [x for x, _ in values], [y for _, y in values])


def smooth(name: str, style: str, rows: list[dict], key: str, count: int = 120) -> Curve:
    """Return the curve of `points`, averaged over equal parts of the rows, at most `count` parts."""
    raw = points(name, style, rows, key)
    parts = [p for p in np.array_split(np.arange(len(raw.x)), min(count, max(1, len(raw.x)))) if len(p)]
    x, y = np.array(raw.x), np.array(raw.y)
    return Curve(name, style, [float(x[p].mean()) for p in parts], [float(y[p].mean()) for p in parts])


def _speed(run: Run) -> str:
    speed = smooth("training", "line1", run.train, "speed")
    waiting = smooth("waiting for data", "line2", [_in_percent(r, "waiting") for r in run.train], "waiting")
    memory = points("peak so far", "line1", run.valid, "peak_gib")
    figures = ""
    for title, curve in (("Speed, seconds of audio per second", speed), ("Time waiting for data, percent", waiting),
                         ("Memory of the training process, GiB", memory)):  # fmt: skip
        if curve.x:
            figures += figure(title, [curve], x_label="epoch", show_legend=False)
    return f'<details><summary>Speed and memory</summary><div class="pair">{figures}</div></details>' if figures else ""


def _in_percent(row: dict, key: str) -> dict:
    value = row.get(key)
    return {**row, key: 100 * value} if isinstance(value, int | float) else row


# ---------------------------------------------------------------------------------------------------------- Attention


def _attention(run: Run) -> str:
    files = _chosen(run.attention_files, run.formed_epoch)
    figures, caption = [], ""
    for path, is_formed in files:
        epoch, pictures = read_attention(path)
        for name, text, weights in pictures[:1]:
            when = f"epoch {epoch:g}" + (", formed" if is_formed else "")
            figures.append(attention_figure(name, text, weights, when, run.frame_seconds))
            caption = html.escape(f"{name}: {text}")
    if not figures:
        return ""
    return (
        "<h2>Attention over epochs</h2><p>Attention weights of each character (rows) over time (columns), with teacher "
        "forcing. All pictures have the same colours, from black for 0 to light yellow for 1.</p>"
        f'<p class="text">{caption}</p><div class="trio">{"".join(figures)}</div>'
    )


def _chosen(files: Sequence[Path], formed: float | None) -> list[tuple[Path, bool]]:
    """Return at most MAX_PICTURES of the attention files, and for each whether it is that at which attention formed.

    These are the first, the last, the one at which attention formed, and others at equal distances.
    """
    at_formed = [p for p in files if formed is not None and abs(epoch_of(p) - formed) < 0.005]  # names have 2 decimals
    count = min(len(files), MAX_PICTURES - len(at_formed[:1]))
    others = [round(i) for i in np.linspace(0, len(files) - 1, count).tolist()]
    chosen = {files[i] for i in others} | set(at_formed[:1])
    return [(path, path in at_formed) for path in files if path in chosen]


def attention_figure(name: str, text: str, weights: np.ndarray, when: str, frame_seconds: float | None) -> str:
    """Return a figure of the attention weights (U, T) of utterance `name`; `when` is its caption."""
    buffer = io.BytesIO()
    draw_attention(buffer, weights, text, "", frame_seconds=frame_seconds, in_page=True)
    image = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    alt = html.escape(f"attention of {name} at {when}")
    return f'<figure><figcaption>{html.escape(when)}</figcaption><img alt="{alt}" src="{image}"></figure>'


# ------------------------------------------------------------------------------------------------------------- Tables


def _validations(run: Run) -> str:
    rows = run.valid
    if not rows:
        return ""
    names = list(THRESHOLDS)
    cells = ["epoch", "loss", "LD", "CER", "WER", *(name.replace("_", " ") for name in names)]
    lines = ["<tr>" + "".join(f'<th class="rate">{c}</th>' for c in cells) + "</tr>"]
    for row in rows:
        monitor = row.get("monitor", {})
        values = [f"{row['epoch']:g}", *(number(row.get(key)) for key in ("loss", "ld", "cer", "wer"))]
        values += [number(monitor.get(name)) for name in names]
        lines.append("<tr>" + "".join(f'<td class="rate">{v}</td>' for v in values) + "</tr>")
    last = html.escape(str(rows[-1].get("line", "")))
    table = f'<div class="wide"><table>{"".join(lines)}</table></div>'
    return f"<details><summary>Validations</summary><p>{last}</p>{table}</details>"


def number(value: float | None) -> str:
    """Format a number for a table; "" for None."""
    return "" if value is None else f"{value:.2f}"


def origins(runs: Sequence[Run]) -> str:
    """Return the section with command, date, machine and commit of each start of the runs; "" if none is known."""
    lines = []
    for run in runs:
        for start in run.starts:
            known = {name: html.escape(str(start.get(name, ""))) for name in
                     ("date", "command", "step", "machine", "device", "version", "commit")}  # fmt: skip
            place = f"las_fast {known['version']}, commit {known['commit']}<br>{known['machine']}, {known['device']}"
            when = f"{known['date'].replace('T', ' ').replace('+00:00', ' UTC')}<br>from step {known['step']}"
            name = f'<td class="name">{html.escape(run.name)}</td>' if len(runs) > 1 else ""
            lines.append(f'<tr>{name}<td>{when}</td><td>{place}</td><td class="text">{known["command"]}</td></tr>')
    if not lines:
        return ""
    name = "<th>run</th>" if len(runs) > 1 else ""
    head = f"<tr>{name}<th>date</th><th>version and machine</th><th>command</th></tr>"
    table = f'<div class="wide"><table>{head}{"".join(lines)}</table></div>'
    return f"<details><summary>Commands, commits and machines</summary>{table}</details>"


def settings(runs: Sequence[Run]) -> str:
    """Return the section with the settings of each run that has any."""
    parts = ""
    for run in runs:
        name = f" of {html.escape(run.name)}" if len(runs) > 1 else ""
        if run.settings:
            parts += f"<details><summary>Settings{name}</summary><pre>{html.escape(run.settings)}</pre></details>"
    return parts
