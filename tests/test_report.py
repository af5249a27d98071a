"""The report: its pictures, its differences, and that it stands alone."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from las_fast import report
from las_fast.config import Config, to_yaml
from las_fast.errors import InputError

ROWS = [
    ("a-1", "TEN PAST TWO", "TEN PAST TWO"),
    ("a-2", "<b>NOT & MARKUP</b>", "<b>NOT AND MARKUP"),
    ("a-3", "SEVEN", ""),
    ("a-4", "", "SEVEN"),
]


def write_run(run, *, epochs=4, formed=3, pictures=True):
    (run / "attention").mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(Config()))
    lines = []
    for epoch in range(1, epochs + 1):
        train = {"loss": 3 / epoch, "attention": 2 / epoch}
        lines.append({"kind": "train", "step": 10 * epoch, "epoch": epoch - 0.5, **train})
        monitor = {"diagonal": 0.5, "sharp": 0.5, "monotonic": 0.9, "coverage": 0.9, "formed": epoch >= formed}
        lines.append({"kind": "valid", "step": 10 * epoch, "epoch": float(epoch), "loss": 2 / epoch, "ld": 9 / epoch,
                      "cer": 90 / epoch, "wer": 99 / epoch, "monitor": monitor, "line": "attention: ..."})  # fmt: skip
        if pictures:
            arrays = {"weights_0": np.eye(4, 12, dtype=np.float32), "text_0": np.array("A B")}
            np.savez(run / "attention" / f"epoch-{epoch:07.2f}.npz", ids=np.array(["dev-1"]), **arrays)
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tra')
    return run


def make(tmp_path, rows=ROWS, title="A title", **options):
    run = write_run(tmp_path / "run", **options)
    results = {"utterances": len(rows), "ld": 1.25, "cer": 12.345, "wer": 20.0, "rtfx": 123.4, "seconds": 1.0}
    report.write_report(run, tmp_path / "report.html", results=results, rows=rows, title=title)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def spans(text):
    return re.findall(r'<span class="(\w+)">(.*?)</span>', text)


def test_differences_mark_what_was_missed_added_and_replaced():
    said, heard = report.differences("WE NEED THE CAR", "WE THE BARS")
    assert ("delete", "NEED ") in spans(said)
    assert ("replace", "C") in spans(said) and ("replace", "B") in spans(heard)
    assert ("insert", "S") in spans(heard)
    assert report.differences("SAME", "SAME") == ("SAME", "SAME")


def test_the_unmarked_and_marked_text_together_are_the_text():
    for reference, hypothesis in (("KITTEN", "SITTING"), ("", "ABC"), ("ABC", ""), ("A B", "B A")):
        plain = [re.sub(r"<[^>]+>", "", part) for part in report.differences(reference, hypothesis)]
        assert plain == [reference, hypothesis]


def test_differences_escape_markup():
    said, heard = report.differences("<A> & B", "<A> B")
    assert "<A>" not in said + heard and "&lt;A&gt;" in said and "&amp;" in said


def test_an_attention_picture_is_a_png_whatever_the_suffix(tmp_path):
    path = tmp_path / ".picture.png.123"
    report.attention_picture(path, np.random.rand(13, 40).astype(np.float32), "TEN PAST TWO", "a-1, epoch 3")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("tokens, frames", [(1, 1), (2, 3), (13, 7), (400, 900)])
def test_pictures_of_any_size_can_be_drawn(tmp_path, tokens, frames):
    weights = np.zeros((tokens, frames), dtype=np.float32)
    report.attention_picture(tmp_path / "a.png", weights, "A" * (tokens - 1), "", frame_seconds=0.04)
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_the_report_needs_nothing_from_outside(tmp_path):
    page = make(tmp_path)
    assert not re.search(r'(src|href)\s*=\s*"(?!data:)', page)
    assert "http" not in page and "<script" not in page and "@import" not in page
    assert "prefers-color-scheme: dark" in page


def test_the_report_shows_scores_curves_attention_and_settings(tmp_path):
    page = make(tmp_path)
    for wanted in ("12.35 %", "20.00 %", "1.25", "123 ×", "A title"):
        assert wanted in page
    assert page.count("<svg") == 2
    assert page.count("attention formed, epoch 3") == 2
    assert page.count("data:image/png;base64,") == 3  # first, formed, last
    assert "epoch 3, formed" in page
    assert "label_smoothing: 0.1" in page
    assert "1 of 4 have no error" in page


def test_the_first_and_last_picture_suffice_when_it_never_formed(tmp_path):
    page = make(tmp_path, formed=99)
    assert page.count("data:image/png;base64,") == 2
    assert "The attention has not formed" in page and "attention formed" not in page


def test_the_report_is_well_formed_html_with_text_escaped(tmp_path):
    page = make(tmp_path, title="<i>hostile</i>", rows=[("<u>", "<s>A", "<s>B")])
    assert "<i>hostile" not in page and "<u>" not in page and "<s>" not in page

    class Balance(HTMLParser):
        open_tags: list = []

        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "br", "img"):
                self.open_tags.append(tag)

        def handle_endtag(self, tag):
            assert self.open_tags.pop() == tag

        def handle_startendtag(self, tag, attrs):
            pass

    parser = Balance()
    parser.feed(page)
    assert parser.open_tags == []


def test_worst_come_first_and_an_utterance_is_listed_once(tmp_path):
    page = make(tmp_path)
    names = re.findall(r'<td class="name">(.*?)</td>', page)
    assert names == ["a-4", "a-3", "a-2", "a-1"]


def test_a_run_without_validations_or_pictures_still_reports(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "log.jsonl").write_text("")
    report.write_report(run, tmp_path / "r.html", results={}, rows=[], title="empty")
    assert "No values were logged" in (tmp_path / "r.html").read_text()


def test_values_that_are_not_finite_do_not_break_the_curves():
    nan = float("nan")
    svg = report.curves_svg([report.Curve("a", "line1", [0, 1, 2], [1.0, nan, 3.0])], x_label="x", y_label="y")
    assert "nan" not in svg
    only = report.curves_svg([report.Curve("a", "line1", [0], [nan])], x_label="x", y_label="y")
    assert "No values" in only


@pytest.mark.parametrize("most", [1e-6, 0.3, 1, 7, 99.9, 100, 12345])
def test_ticks_are_few_and_reach_the_largest_value(most):
    ticks = report._ticks(most)
    assert 3 <= len(ticks) <= 7 and ticks[0] == 0 and ticks[-1] >= most * (1 - 1e-9)


def test_a_folder_that_is_no_training_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="log.jsonl is missing"):
        report.write_report(tmp_path, tmp_path / "r.html", results={}, rows=[], title="x")
    assert not (tmp_path / "r.html").exists()


def test_a_step_without_a_loss_is_left_out_of_its_curve():
    rows = [{"epoch": 1.0, "loss": None}, {"epoch": 2.0}, {"epoch": 3.0, "loss": 4.0}, {"epoch": 4.0, "loss": math.nan}]
    curve = report._smooth("loss", "solid", rows, "loss")
    assert (curve.x, curve.y) == ([3.0], [4.0])
