"""The report of a run: one self-contained HTML file with a light and a dark theme."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from las_fast.config import Config, from_yaml
from las_fast.errors import InputError
from las_fast.files import write_text_atomically
from las_fast.output.figures import Curve, curves_svg, draw_attention
from las_fast.training.monitor import THRESHOLDS
from las_fast.training.runlog import read_rows

TEMPLATE = Path(__file__).with_name("report.html")  # with @title@ and @body@
MAX_ROWS = 12  # in each of the tables of best and worst utterances


# --------------------------------------------------------------------------------------------------------- differences


def differences(reference: str, hypothesis: str) -> tuple[str, str]:
    """Reference and hypothesis as HTML, with deleted, inserted and replaced text in spans of these classes."""
    from Levenshtein import opcodes

    reference_parts, hypothesis_parts = [], []
    for kind, a, b, c, d in opcodes(reference, hypothesis):
        reference_parts.append(_span(kind, reference[a:b]))
        hypothesis_parts.append(_span(kind, hypothesis[c:d]))
    return "".join(reference_parts), "".join(hypothesis_parts)


def _span(kind: str, text: str) -> str:
    escaped = html.escape(text)
    return escaped if kind == "equal" or not text else f'<span class="{kind}">{escaped}</span>'


# ----------------------------------------------------------------------------------------------------------------- run


def read_log(run: str | Path) -> list[dict]:
    """Rows of run/log.jsonl.

    Raises:
        InputError: the run folder has no log.
    """
    path = Path(run) / "log.jsonl"
    if not path.is_file():
        raise InputError(f"{path} is missing; give the --out folder of a training")
    return read_rows(path)


def formed_epoch(log: list[dict]) -> float | None:
    """Epoch of the first validation whose attention has formed, or None."""
    return next((row["epoch"] for row in log if row.get("monitor", {}).get("formed")), None)


def _read_config(run: Path) -> tuple[Config, str] | None:
    path = run / "config.yaml"
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8")
    return from_yaml(text, str(path)), text


def _frame_seconds(config: Config) -> float:
    from las_fast.data.features import seconds_of  # imports torch

    return seconds_of(config.model.listener.time_reduction, config.features)


def read_attention(path: Path) -> tuple[float, list[tuple[str, str, np.ndarray]]]:
    """Read attention/epoch-*.npz of a run: its epoch, and (id, text, weights) of each utterance."""
    with np.load(path, allow_pickle=False) as data:
        ids = [str(i) for i in data["ids"]]
        pictures = [(i, str(data[f"text_{n}"]), data[f"weights_{n}"]) for n, i in enumerate(ids)]
    return epoch_of(path), pictures


def epoch_of(path: Path) -> float:
    """Epoch in the name of an attention/epoch-*.npz."""
    return float(path.stem.removeprefix("epoch-"))


# ---------------------------------------------------------------------------------------------------------------- page


def write_report(
    run: str | Path,
    out: str | Path,
    *,
    results: dict,
    rows: Sequence[tuple[str, str, str]],
    title: str,
) -> None:
    """Write the report of a training and its decoded utterances as one HTML file.

    Args:
        run:     run folder, with log.jsonl and perhaps config.yaml and attention/.
        out:     the HTML file.
        results: any of utterances, ld, cer, wer, rtfx, seconds, audio_seconds.
        rows:    (id, reference, hypothesis) of each decoded utterance.

    Raises:
        InputError: run is not a run folder, or out cannot be written.
    """
    run = Path(run)
    log, config = read_log(run), _read_config(run)
    formed = formed_epoch(log)
    body = [
        f"<h1>{html.escape(title)}</h1>",
        _headline(results),
        _training(log, formed),
        _attention(run, formed, _frame_seconds(config[0]) if config else None),
        _utterances(rows),
        _validations(log),
        f"<details><summary>Settings</summary><pre>{html.escape(config[1])}</pre></details>" if config else "",
    ]
    template = TEMPLATE.read_text(encoding="utf-8")
    page = template.replace("@title@", html.escape(title)).replace("@body@", "\n".join(body))
    write_text_atomically(out, page)


def _headline(results: dict) -> str:
    metrics = [
        ("cer", "CER", "{:.2f} %", "character edits per reference character"),
        ("wer", "WER", "{:.2f} %", "word edits per reference word"),
        ("ld", "LD", "{:.2f}", "character edits per utterance"),
        ("utterances", "utterances", "{:,}", "decoded"),
        ("rtfx", "speed", "{:,.0f} ×", "faster than real time, decoding"),
    ]
    tiles = [
        f'<div class="tile"><b>{form.format(results[key])}</b><span>{name}</span><small>{unit}</small></div>'
        for key, name, form, unit in metrics
        if results.get(key) is not None
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _training(log: list[dict], formed: float | None) -> str:
    train = [r for r in log if r["kind"] == "train"]
    valid = [r for r in log if r["kind"] == "valid"]
    mark = None if formed is None else (formed, f"attention formed, epoch {formed:g}")
    verdict = "has not formed" if formed is None else f"had formed by epoch {formed:g}"
    losses = [
        _smooth("training, all parts", "line3", train, "loss"),
        _smooth("training, speller", "line1", train, "attention"),
        _points("dev, speller", "line2", valid, "loss"),
    ]
    rates = [_points("dev CER", "line1", valid, "cer"), _points("dev WER", "line2", valid, "wer")]
    figures = ""
    for name, curves in (("Loss, nats per token", losses), ("Dev error, percent, greedy", rates)):
        svg = curves_svg([c for c in curves if c.x], x_label="epoch", y_label=name, mark=mark)
        figures += f"<figure><figcaption>{name}</figcaption>{svg}</figure>"
    return f'<h2>Training</h2><p>The attention {verdict}.</p><div class="pair">{figures}</div>'


def _points(name: str, style: str, rows: list[dict], key: str) -> Curve:
    points = [(r["epoch"], r[key]) for r in rows if isinstance(r.get(key), int | float)]
    return Curve(name, style, [x for x, _ in points], [y for _, y in points])


def _smooth(name: str, style: str, rows: list[dict], key: str, points: int = 120) -> Curve:
    """Average a curve over equal parts of the training, at most `points` of them."""
    raw = _points(name, style, [r for r in rows if r.get(key) is not None and math.isfinite(r[key])], key)
    parts = [p for p in np.array_split(np.arange(len(raw.x)), min(points, max(1, len(raw.x)))) if len(p)]
    x, y = np.array(raw.x), np.array(raw.y)
    return Curve(name, style, [float(x[p].mean()) for p in parts], [float(y[p].mean()) for p in parts])


def _attention(run: Path, formed: float | None, frame_seconds: float | None) -> str:
    files = sorted((run / "attention").glob("epoch-*.npz"))
    if not files:
        return ""
    first, last = files[0], files[-1]
    at_formed = [
        p for p in files if formed is not None and abs(epoch_of(p) - formed) < 0.005
    ]  # file names have 2 decimals
    figures, caption = [], ""
    for path in dict.fromkeys([first, *at_formed[:1], last]):
        epoch, pictures = read_attention(path)
        for name, text, weights in pictures[:1]:
            when = f"epoch {epoch:g}" + (", formed" if path in at_formed else "")
            figures.append(_attention_figure(name, text, weights, when, frame_seconds))
            caption = html.escape(f"{name}: {text}")
    return (
        "<h2>Attention before and after</h2><p>Attention weights of each character (rows) over time (columns), with "
        "teacher forcing; brighter is more.</p>"
        f'<p class="text">{caption}</p><div class="trio">{"".join(figures)}</div>'
    )


def _attention_figure(name: str, text: str, weights: np.ndarray, when: str, frame_seconds: float | None) -> str:
    buffer = io.BytesIO()
    draw_attention(buffer, weights, text, "", frame_seconds=frame_seconds, in_page=True)
    image = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    alt = html.escape(f"attention of {name} at {when}")
    return f'<figure><figcaption>{when}</figcaption><img alt="{alt}" src="{image}"></figure>'


def _utterances(rows: Sequence[tuple[str, str, str]]) -> str:
    if not rows:
        return ""
    from Levenshtein import distance

    scored = sorted((100 * distance(r, h) / max(1, len(r)), name, r, h) for name, r, h in rows)
    correct = sum(1 for rate, *_ in scored if rate == 0)
    worst = [row for row in reversed(scored) if row[0] > 0][:MAX_ROWS]
    others = scored[: len(scored) - len(worst)]
    best = sorted(others, key=lambda row: (row[0], -len(row[2])))[:MAX_ROWS]  # of equal rates, the longer texts first
    legend = (
        '<p>Each utterance: the reference, and below it the hypothesis. <span class="text"><span class="delete">missed'
        '</span> <span class="insert">added</span> <span class="replace">replaced</span></span></p>'
    )
    tables = "".join(f"<h3>{name}</h3>{_table(part)}" for name, part in (("Worst", worst), ("Best", best)) if part)
    return f"<h2>Utterances</h2><p>{correct:,} of {len(scored):,} have no error.</p>{legend}{tables}"


def _table(rows: Sequence[tuple[float, str, str, str]]) -> str:
    lines = []
    for rate, name, reference, hypothesis in rows:
        marked_reference, marked_hypothesis = differences(reference, hypothesis)
        texts = f"{marked_reference or '&nbsp;'}<br>{marked_hypothesis or '&nbsp;'}"
        if reference == hypothesis:
            texts = marked_reference
        lines.append(
            f'<tr><td class="name">{html.escape(name)}</td><td class="rate">{rate:.0f} %</td>'
            f'<td class="text">{texts}</td></tr>'
        )
    head = '<tr><th>utterance</th><th class="rate">CER</th><th>reference / hypothesis</th></tr>'
    return f'<div class="wide"><table>{head}{"".join(lines)}</table></div>'


def _validations(log: list[dict]) -> str:
    rows = [r for r in log if r["kind"] == "valid"]
    if not rows:
        return ""
    names = list(THRESHOLDS)
    cells = ["epoch", "loss", "LD", "CER", "WER", *(name.replace("_", " ") for name in names)]
    lines = ["<tr>" + "".join(f'<th class="rate">{c}</th>' for c in cells) + "</tr>"]
    for row in rows:
        monitor = row.get("monitor", {})
        values = [f"{row['epoch']:g}", *(_number(row.get(key)) for key in ("loss", "ld", "cer", "wer"))]
        values += [_number(monitor.get(name)) for name in names]
        lines.append("<tr>" + "".join(f'<td class="rate">{v}</td>' for v in values) + "</tr>")
    last = html.escape(str(rows[-1].get("line", "")))
    table = f'<div class="wide"><table>{"".join(lines)}</table></div>'
    return f"<details><summary>Validations</summary><p>{last}</p>{table}</details>"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
