"""The report of several runs."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from las_fast.config import Config, to_yaml
from las_fast.errors import InputError
from las_fast.output.mistakes import Decoded, DecodedSplit
from las_fast.training import report
from las_fast.training.comparison import STYLES, differing_settings, write_comparison
from las_fast.training.runs import open_runs


def make_run(path, *, rate=1e-3, ids=("dev-1",), cer=(60.0, 30.0)):
    (path / "attention").mkdir(parents=True)
    config = Config()
    config = replace(config, training=replace(config.training, learning_rate=rate))
    (path / "config.yaml").write_text(to_yaml(config))
    rows = [{"kind": "train", "step": 5, "epoch": 0.5, "attention": 2.0, "lr": rate, "speed": 30.0}]
    for i, value in enumerate(cer, 1):
        scores = {"loss": 1.0, "cer": value, "wer": 2 * value, "monitor": {"formed": i > 1}, "core_hours": 0.5 * i}
        rows.append({"kind": "valid", "step": 10 * i, "epoch": float(i), **scores})
    (path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arrays = {f"weights_{n}": np.eye(4, 12, dtype=np.float32) for n in range(len(ids))}
    arrays |= {f"text_{n}": np.array(f"TEXT {name}") for n, name in enumerate(ids)}
    np.savez(path / "attention" / "epoch-0002.00.npz", ids=np.array(ids), **arrays)
    return path


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """Replace the drawing of attention by a few bytes. Returns a list of the texts."""
    texts = []
    monkeypatch.setattr(
        report, "draw_attention", lambda file, weights, text, title, **options: texts.append(text) or file.write(b"x")
    )
    return texts


def page_of(tmp_path, *paths, rows=()):
    decoded = DecodedSplit([Decoded(*row) for row in rows])
    write_comparison(paths, tmp_path / "r.html", title="two", decoded=decoded)
    return (tmp_path / "r.html").read_text(encoding="utf-8")


def test_each_run_has_one_colour_in_every_figure(tmp_path):
    page = page_of(tmp_path, make_run(tmp_path / "a"), make_run(tmp_path / "b", cer=(80.0, 50.0, 40.0)))
    training = page[page.index("<h2>Training") : page.index("<h2>Different")]
    assert re.findall(r'<i class="swatch (\w+)"></i>(.*?)</span>', training) == [("line1", "a"), ("line2", "b")]
    figures = training.split("<figcaption>")[1:]
    captions = ["Dev CER, percent, greedy, at most 100", "Dev loss of the speller, nats per token",
                "Training loss of the speller, nats per token", "Learning rate, thousandths"]  # fmt: skip
    assert [figure.partition("</figcaption>")[0] for figure in figures] == captions
    assert all(re.findall(r'<path class="curve (\w+)"', figure) == ["line1", "line2"] for figure in figures)
    assert len(re.findall(r'<circle class="dot line2"', figures[0])) == 3


def test_a_cer_above_100_does_not_flatten_the_curves_of_other_runs(tmp_path):
    page = page_of(tmp_path, make_run(tmp_path / "a", cer=(506.0, 250.0)), make_run(tmp_path / "b"))
    figure = page[page.index("Dev CER") : page.index("Dev loss")]
    assert ">100</text>" in figure and ">200</text>" not in figure and 'cy="14.0"' in figure


def test_the_summary_has_a_row_per_run(tmp_path):
    stopped = make_run(tmp_path / "b", cer=(80.0,))
    with (stopped / "log.jsonl").open("a") as log:
        log.write(json.dumps({"kind": "train", "step": 16, "epoch": 1.54762, "speed": 30.0}) + "\n")
    page = page_of(tmp_path, make_run(tmp_path / "a"), stopped)
    heads, *rows = page[: page.index("<h2>Training")].split("<tr>")[1:]
    columns = ["epochs", "best dev CER", "at epoch", "WER", "attention formed", "speed", "memory, GiB", "core hours"]
    assert re.findall(r"<th.*?>(.*?)</th>", heads) == ["run", *columns]
    cells = [re.findall(r'<td class="rate">(.*?)</td>', row) for row in rows]
    assert cells == [
        ["2", "30.00 %", "2", "60.00 %", "epoch 2", "30 ×", "", "1.00"],
        ["1.5", "80.00 %", "1", "160.00 %", "no", "30 ×", "", "0.50"],
    ]


def test_only_settings_that_differ_are_listed(tmp_path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", rate=0.5)]
    assert differing_settings(open_runs(runs)) == {"training.learning_rate": ["0.001", "0.5"]}
    assert '<td class="name">training.learning_rate</td><td>0.001</td><td>0.5</td>' in page_of(tmp_path, *runs)
    assert "All settings are equal" in page_of(tmp_path, runs[0], make_run(tmp_path / "c"))
    (runs[1] / "config.yaml").write_text("settings_of_1999: 1\n")
    page = page_of(tmp_path, *runs)
    assert "The settings of b are unknown" in page and "All settings are equal" not in page


def test_attention_is_that_of_an_utterance_that_all_runs_drew(tmp_path, drawn):
    page_of(tmp_path, make_run(tmp_path / "a", ids=("x", "y")), make_run(tmp_path / "b", ids=("y", "z")))
    assert drawn == ["TEXT y", "TEXT y"]
    page = page_of(tmp_path, tmp_path / "a", make_run(tmp_path / "c", ids=("q",)))
    assert drawn[2:] == ["TEXT x", "TEXT q"] and "c, epoch 2, q" in page


def test_runs_without_validations_or_pictures_are_compared_too(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "log.jsonl").write_text("")
    page = page_of(tmp_path, make_run(tmp_path / "a"), tmp_path / "b", rows=[("u", "ABC", "ABD")])
    assert "0 of 1 have no error" in page and page.count('<td class="name"><i class="swatch') == 2


def test_more_runs_than_styles_are_refused(tmp_path):
    with pytest.raises(InputError, match=f"dashes for {len(STYLES)} runs; got {len(STYLES) + 1}; give fewer"):
        page_of(tmp_path, *[tmp_path] * (len(STYLES) + 1))
    assert len(set(STYLES)) == 24
