"""The report: pictures, differences and curves in one self-contained file."""

import html
import io
import json
import math
import re
import struct
from html.parser import HTMLParser
from types import SimpleNamespace
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.layout_engine import ConstrainedLayoutEngine

from las_fast.config import Config, FeatureConfig, to_yaml
from las_fast.errors import InputError
from las_fast.output import figures
from las_fast.output.mistakes import Decoded, DecodedSplit
from las_fast.training import report, runs
from las_fast.training.origin import read_starts, write_start

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
        line = f"attention: {epoch}"
        monitor = {"diagonal": 0.5, "sharp": 0.5, "monotonic": 0.9, "coverage": 0.9, "formed": epoch >= formed}
        lines.append({"kind": "valid", "step": 10 * epoch, "epoch": float(epoch), "loss": 2 / epoch, "ld": 9 / epoch,
                      "cer": 90 / epoch, "wer": 99 / epoch, "monitor": monitor, "line": line})  # fmt: skip
        if pictures:
            arrays = {f"weights_{n}": np.eye(4, 12, dtype=np.float32) for n in range(2)}
            arrays |= {"text_0": np.array("A B"), "text_1": np.array("C D")}
            np.savez(run / "attention" / f"epoch-{epoch:07.2f}.npz", ids=np.array(["dev-1", "dev-2"]), **arrays)
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tra')
    return run


def make(tmp_path, rows=ROWS, title="A title", **options):
    run = write_run(tmp_path / "run", **options)
    results = {"utterances": len(rows), "ld": 1.25, "cer": 12.345, "wer": 20.0, "rtfx": 123.4, "seconds": 1.0}
    decoded = DecodedSplit([Decoded(*row) for row in rows], results)
    report.write_report(run, tmp_path / "report.html", title=title, decoded=decoded)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def fake_drawing(monkeypatch):
    """Replace the drawing of attention by a few bytes. Returns a list of each picture's (text, options)."""
    drawn = []

    def draw(file, weights, text, title, **options):
        drawn.append((text, options))
        file.write(b"a picture")

    monkeypatch.setattr(report, "draw_attention", draw)
    return drawn


def test_an_attention_picture_is_a_png_with_any_suffix(tmp_path):
    path = tmp_path / ".picture.png.123"
    figures.attention_picture(path, np.random.rand(13, 40).astype(np.float32), "TEN PAST TWO", "a-1, epoch 3")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("tokens, frames", [(1, 1), (2, 3), (13, 7), (400, 900)])
def test_pictures_of_any_size_can_be_drawn(tmp_path, tokens, frames):
    weights = np.zeros((tokens, frames), dtype=np.float32)
    figures.attention_picture(tmp_path / "a.png", weights, "A" * (tokens - 1), "", frame_seconds=0.04)
    assert (tmp_path / "a.png").stat().st_size > 1000


def png_size(data):
    return struct.unpack(">II", data[16:24])


@pytest.mark.parametrize(("tokens", "height"), [(1, 2.2), (20, 4.1), (400, 12.0)])
def test_a_picture_is_as_high_as_its_text_is_long(tmp_path, tokens, height):
    weights = np.eye(tokens, 30, dtype=np.float32)
    figures.attention_picture(tmp_path / "a.png", weights, "A" * (tokens - 1), "title")
    assert png_size((tmp_path / "a.png").read_bytes()) == (704, round(110 * height))
    buffer = io.BytesIO()
    figures.draw_attention(buffer, weights, "A" * (tokens - 1), "", frame_seconds=None, in_page=True)
    assert png_size(buffer.getvalue()) == (round(130 * 4.2), pytest.approx(130 * height, abs=1))


@pytest.mark.parametrize(("frame_seconds", "end", "label"), [(None, 12.0, "encoder frame"), (0.04, 0.48, "seconds")])
def test_the_axes_of_a_picture_show_frames_or_seconds_and_every_token(tmp_path, monkeypatch, frame_seconds, end, label):
    seen = {}
    for kind, name in ((Axes, "imshow"), (Axes, "set_xlabel"), (Axes, "set_title"), (Axes, "set_yticks"),
                       (Figure, "colorbar")):  # fmt: skip
        method = getattr(kind, name)

        def spy(self, *args, method=method, name=name, **options):
            seen[name], seen["figure"] = (args, options), self.get_figure()
            return method(self, *args, **options)

        monkeypatch.setattr(kind, name, spy)
    monkeypatch.setattr(FigureCanvasAgg, "print_figure", lambda self, file, **options: seen.update(printed=options))
    weights = np.full((4, 12), 0.5, np.float32)
    figures.attention_picture(tmp_path / "a.png", weights, "A B", "a title", frame_seconds=frame_seconds)
    options = seen["imshow"][1]
    assert options["extent"] == pytest.approx((0.0, end, 3.5, -0.5)) and (options["vmin"], options["vmax"]) == (0, 1)
    assert (options["aspect"], options["interpolation"], options["cmap"]) == ("auto", "nearest", "magma")
    assert seen["set_xlabel"][0] == (label,) and seen["set_title"] == (
        ("a title",),
        {"fontsize": 9, "parse_math": False},
    )
    assert seen["set_yticks"][1] == {"fontsize": 7, "family": "monospace"}
    assert seen["colorbar"][1] == {
        "ax": seen["figure"].axes[0], "pad": 0.01, "fraction": 0.03, "aspect": 40, "label": "attention weight",
    }  # fmt: skip
    assert isinstance(seen["figure"].get_layout_engine(), ConstrainedLayoutEngine)
    assert (seen["printed"]["format"], seen["printed"]["dpi"]) == ("png", 110)


def pixels(draw):
    buffer = io.BytesIO()
    draw(buffer)
    buffer.seek(0)
    return imread(buffer)  # (height, width, 4) from 0 to 1


def test_pictures_in_the_page_are_transparent_and_grey_and_others_white():
    bright = np.full((4, 12), 0.5, np.float32)
    page = pixels(lambda f: figures.draw_attention(f, bright, "A B", "title", frame_seconds=0.1, in_page=True))
    opaque = page[page[..., 3] > 0.9][:, :3]
    assert page[0, 0, 3] == 0 and page[-1, -1, 3] == 0
    assert opaque.max(1).min() > 0.45, "nothing is too dark for a dark page"
    grey = (np.abs(page[..., :3] - 128 / 255).max(-1) < 0.01) & (page[..., 3] > 0.9)
    rows, columns = np.nonzero(grey)
    assert rows.max() > 0.9 * page.shape[0] and columns.min() < 0.1 * page.shape[1], "ticks and label are grey"
    alone = pixels(lambda f: figures.draw_attention(f, bright, "A B", "title", frame_seconds=0.1))
    assert alone[0, 0].tolist() == [1, 1, 1, 1] and alone[..., :3].max(-1).min() < 0.1


def test_a_picture_does_not_depend_on_the_users_matplotlib_settings(tmp_path):
    weights = np.eye(4, 12, dtype=np.float32)
    figures.attention_picture(tmp_path / "a.png", weights, "A B", "title")
    with matplotlib.rc_context({"savefig.format": "pdf", "savefig.facecolor": "red", "savefig.dpi": 30}):
        figures.attention_picture(tmp_path / "b.png", weights.tolist(), "A B", "title")
    assert np.array_equal(imread(tmp_path / "a.png"), imread(tmp_path / "b.png"))


@pytest.mark.parametrize(
    ("text", "tokens", "ticks", "labels"),
    [
        ("A B", 4, [0, 1, 2, 3], ["A", "␣", "B", "<eos>"]),
        ("A B", 3, [0, 1, 2], ["A", "␣", "B"]),
        ("AB" * 40, 80, [*range(80)], ["A", "B"] * 40),
        ("AB" * 40, 81, [*range(0, 81, 2)], ["A"] * 40 + ["<eos>"]),
    ],
)
def test_rows_are_labelled_and_of_long_texts_only_every_nth(text, tokens, ticks, labels):
    actual = []
    axes = SimpleNamespace(set_yticks=lambda *args, **options: actual.append((list(args[0]), args[1], options)))
    figures.label_tokens(axes, text, tokens, fontsize=7)
    assert actual == [(ticks, labels, {"fontsize": 7, "family": "monospace"})]


def test_the_report_needs_no_external_files(tmp_path, fake_drawing):
    page = make(tmp_path)
    assert not re.search(r'(src|href)\s*=\s*"(?!data:)', page)
    assert "http" not in page and "<script" not in page and "@import" not in page
    assert "prefers-color-scheme: dark" in page


def test_the_report_shows_scores_curves_attention_and_settings(tmp_path):
    page = make(tmp_path)
    for wanted in ("12.35 %", "20.00 %", "1.25", "123 ×", "A title"):
        assert wanted in page
    assert page.count("<svg") == 3  # loss, error, and error over length
    assert page.count("attention formed, epoch 3") == 2
    assert page.count("data:image/png;base64,") == 4  # every validation
    assert "epoch 3, formed" in page
    assert "label_smoothing: 0.1" in page
    assert "1 of 4 have no error" in page


def test_without_formed_attention_the_page_says_so(tmp_path, fake_drawing):
    page = make(tmp_path, formed=99)
    assert "The attention has not formed" in page and "attention formed" not in page


def test_the_report_is_well_formed_html_with_text_escaped(tmp_path, fake_drawing):
    page = make(tmp_path, title="<i>hostile</i>", rows=[("<u>", "<s>A", "<s>B")])
    assert "<i>hostile" not in page and "<u>" not in page and "<s>" not in page

    class TagBalance(HTMLParser):
        open_tags: list = []

        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "br", "img"):
                self.open_tags.append(tag)

        def handle_endtag(self, tag):
            assert self.open_tags.pop() == tag

        def handle_startendtag(self, tag, attrs):
            pass

    parser = TagBalance()
    parser.feed(page)
    assert parser.open_tags == []


def test_worst_come_first_and_an_utterance_is_listed_once(tmp_path):
    page = make(tmp_path, pictures=False)
    rows = re.findall(r'<td class="name">(.*?)</td><td class="rate">(.*?)</td><td class="text">(.*?)</td>', page)
    assert [row[:2] for row in rows] == [("a-4", "500 %"), ("a-3", "100 %"), ("a-2", "37 %"), ("a-1", "0 %")]
    assert rows[0][2] == '&nbsp;<br><span class="insert">SEVEN</span>' and rows[3][2] == "TEN PAST TWO"
    assert rows[1][2] == '<span class="delete">SEVEN</span><br>&nbsp;' and rows[2][2].count("<br>") == 1
    assert page.count("<h3>Worst</h3>") == page.count("<h3>Best</h3>") == 1


@pytest.mark.parametrize(("hypothesis", "present", "absent"), [("A", "Best", "Worst"), ("B", "Worst", "Best")])
def test_only_a_table_with_rows_is_shown(tmp_path, hypothesis, present, absent):
    page = make(tmp_path, rows=[("x", "A", hypothesis)], pictures=False)
    assert f"<h3>{present}</h3>" in page and f"<h3>{absent}</h3>" not in page


def test_empty_sections_are_left_out(tmp_path, fake_drawing):
    full, empty = make(tmp_path / "a"), make(tmp_path / "b", rows=[], pictures=False)
    for heading in ("<h2>Attention over epochs</h2>", "<h2>Utterances</h2>"):
        assert heading in full and heading not in empty
    for name in ("config.yaml", "log.jsonl"):
        assert "<summary>Settings</summary>" in full and "<summary>Validations</summary>" in full
        path = tmp_path / "b" / "run" / name
        path.unlink() if name == "config.yaml" else path.write_text("")
    report.write_report(tmp_path / "b" / "run", tmp_path / "r.html", title="x")
    bare = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<summary>" not in bare and bare.count("No values were logged") == 2 and "None" not in full + empty + bare


def test_the_curves_show_total_speller_and_dev_loss_and_dev_error(tmp_path):
    page = make(tmp_path, epochs=4, pictures=False)
    named = re.findall(r'<i class="swatch (line\d)"></i>(.*?)</span>', page)
    assert named[:5] == [("line3", "training, all parts"), ("line1", "training, speller"), ("line2", "dev, speller"),
                     ("line1", "dev CER"), ("line2", "dev WER")]  # fmt: skip
    training = page[: page.index("<h2>Utterances")]
    assert re.findall(r'<circle class="dot (line\d)"', training) == [
        line for line in ("line3", "line1", "line2", "line1", "line2") for _ in range(4)
    ]
    log = tmp_path / "run" / "log.jsonl"
    log.write_text(re.sub(r', "attention": [\d.]+', "", log.read_text()))
    report.write_report(tmp_path / "run", tmp_path / "r.html", title="x")
    assert "training, speller" not in (tmp_path / "r.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("config", [True, False])
def test_pictures_show_seconds_if_the_settings_are_known(tmp_path, fake_drawing, config):
    run = write_run(tmp_path / "run", epochs=1)
    if not config:
        (run / "config.yaml").unlink()
    report.write_report(run, tmp_path / "r.html", title="x")
    seconds = pytest.approx(0.08) if config else None
    assert fake_drawing == [("A B", {"frame_seconds": seconds, "in_page": True})]


def test_the_validation_that_formed_is_distinguished_from_its_neighbours(tmp_path, monkeypatch, fake_drawing):
    monkeypatch.setattr(report, "MAX_PICTURES", 2)
    run = write_run(tmp_path / "run", epochs=5, formed=3)
    (run / "attention" / "epoch-0003.00.npz").rename(run / "attention" / "epoch-0003.01.npz")
    (run / "attention" / "epoch-0005.00.npz").rename(run / "attention" / "epoch-0003.02.npz")
    (run / "attention" / "epoch-0004.00.npz").unlink()
    for formed, shown in ((3.0133, ["1", "3.01, formed"]), (3.0, ["1", "3.02"]), (None, ["1", "3.02"])):
        monkeypatch.setattr(runs.Run, "formed_epoch", formed)
        page = report._attention(runs.open_runs([run])[0])
        assert re.findall(r"<figcaption>epoch (.*?)</figcaption>", page) == shown


def test_attention_is_read_without_pickle(tmp_path):
    np.savez(tmp_path / "epoch-0001.00.npz", ids=np.array([{}], dtype=object))
    with pytest.raises(InputError, match="not attention that a training saved .*allow_pickle"):
        runs.read_attention(tmp_path / "epoch-0001.00.npz")


def test_the_page_counts_rates_and_lists_the_twelve_worst_and_three_best(tmp_path):
    rows = [(f"w-{n:02}", "ABCDEFGHIJ", "ABCDEFGHIJ"[n % 10 + 1 :]) for n in range(13)]
    rows += [(f"b-{n:02}", "A" * (n + 1), "A" * (n + 1)) for n in range(13)]
    page = make(tmp_path, rows=rows, pictures=False)
    names, rates = (re.findall(rf'<td class="{kind}">(.*?)</td>', page) for kind in ("name", "rate"))
    assert "13 of 26 have no error" in page
    assert names[:12] == [f"w-{n:02}" for n in (9, 8, 7, 6, 5, 4, 3, 12, 2, 11, 1, 10)]
    assert names[12:15] == [f"b-{n:02}" for n in (12, 11, 10)]
    assert rates[:3] == ["100 %", "90 %", "80 %"] and rates[12] == "0 %"
    assert re.search(r'<td class="name">b-12</td><td class="rate">0 %</td><td class="text">A{13}</td>', page)


def test_the_page_lists_every_validation(tmp_path):
    page = make(tmp_path, epochs=2, formed=9, pictures=False)
    table = page[page.index("<summary>Validations") :]
    cells = re.findall(r"<t[hd] class=\"rate\">(.*?)</t[hd]>", table)
    heads = ["epoch", "loss", "LD", "CER", "WER", "diagonal", "sharp", "monotonic", "coverage", "audio gain"]
    numbers = ["0.50", "0.50", "0.90", "0.90", ""]
    assert cells == [*heads, "1", "2.00", "9.00", "90.00", "99.00", *numbers, "2", "1.00", "4.50", "45.00", "49.50",
                     *numbers]  # fmt: skip
    assert "<p>attention: 2</p>" in table and page.count("attention: 1") == 0


def test_a_log_of_an_earlier_version_shows_its_audio_gain(tmp_path):
    run = write_run(tmp_path / "run", epochs=1, pictures=False)
    log = run / "log.jsonl"
    log.write_text(log.read_text().replace('"diagonal": 0.5', '"heard": 1.25, "diagonal": 0.5'))
    report.write_report(run, tmp_path / "r.html", title="x")
    assert (tmp_path / "r.html").read_text(encoding="utf-8").count('<td class="rate">1.25</td>') == 1


def test_the_headline_shows_known_scores_only(tmp_path):
    tiles = re.findall(r"<b>(.*?)</b><span>(.*?)</span>", make(tmp_path, pictures=False))
    assert tiles == [("12.35 %", "CER"), ("20.00 %", "WER"), ("1.25", "LD"), ("4", "utterances"), ("123 ×", "speed")]
    assert "tile" not in report.headline({"cer": None}).replace('class="tiles"', "")


def test_the_page_shows_attention_over_epochs_and_where_it_formed(tmp_path, fake_drawing):
    page = make(tmp_path, epochs=26, formed=3)
    epochs = re.findall(r"<figcaption>epoch (.*?)</figcaption>", page)
    assert epochs == ["1", "3, formed", "7", "13", "20", "26"]
    assert '<p class="text">dev-1: A B</p>' in page and 'alt="attention of dev-1 at epoch 3, formed"' in page
    assert "The attention had formed by epoch 3" in page


@pytest.mark.parametrize(("rate", "samples"), [(16_000, 160), (11_025, 110)])
def test_time_in_a_picture_is_counted_in_whole_samples(rate, samples):
    settings = Config(features=FeatureConfig(sample_rate=rate))
    seconds = samples / rate * settings.model.listener.time_reduction
    assert runs.frame_seconds(settings) == pytest.approx(seconds, rel=1e-9)


def test_a_run_without_validations_or_pictures_still_reports(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "log.jsonl").write_text("")
    report.write_report(run, tmp_path / "r.html", title="empty")
    assert "No values were logged" in (tmp_path / "r.html").read_text()


def test_values_that_are_not_finite_do_not_break_the_curves():
    nan = float("nan")
    svg = figures.curves_svg([figures.Curve("a", "line1", [0, 1, 2], [1.0, nan, 3.0])], x_label="x", y_label="y")
    assert "nan" not in svg
    only = figures.curves_svg([figures.Curve("a", "line1", [0], [nan])], x_label="x", y_label="y")
    assert "No values" in only


@pytest.mark.parametrize("maximum", [1e-6, 0.3, 1, 7, 99.9, 100, 12345])
def test_ticks_are_few_and_reach_the_largest_value(maximum):
    ticks = figures._ticks(maximum)
    assert 3 <= len(ticks) <= 7 and ticks[0] == 0 and ticks[-1] >= maximum * (1 - 1e-9)


@pytest.mark.parametrize(
    ("maximum", "ticks"),
    [
        (0, [0, 2e-10, 4e-10, 6e-10, 8e-10, 1e-9]),
        (0.3, [0, 0.1, 0.2, 0.3]),
        (4, [0, 1, 2, 3, 4]),
        (7, [0, 2, 4, 6, 8]),
        (12, [0, 2.5, 5, 7.5, 10, 12.5]),
        (21, [0, 5, 10, 15, 20, 25]),
        (30, [0, 10, 20, 30]),
        (100, [0, 20, 40, 60, 80, 100]),
        (12345, [0, 2500, 5000, 7500, 10000, 12500]),
    ],
)
def test_ticks_are_round_numbers(maximum, ticks):
    assert figures._ticks(maximum) == ticks


def drawn(svg, tag, kind):
    return [dict(e.attrib) | {"text": e.text} for e in ElementTree.fromstring(svg).iter(tag) if e.get("class") == kind]


LINE = figures.Curve("dev & co", "line1", [0, 5, 10], [0.0, 2.0, 4.0])


def test_points_match_the_axes():
    """The plot is 560 by 300 with margins of 48, 14, 12 and 40: x from 48 to 548, y from 260 up to 14."""
    other = figures.Curve("x", "line2", [10], [4.0])
    svg = figures.curves_svg([LINE, other], x_label="epoch", y_label="loss < 5", mark=(5.0, "formed"))
    assert ElementTree.fromstring(svg).attrib == {"viewBox": "0 0 560 300", "role": "img", "aria-label": "loss < 5"}
    ((first,), (second,)) = drawn(svg, "path", "curve line1")[:1], drawn(svg, "path", "curve line2")[:1]
    assert first["d"] == "M48.0 260.0L298.0 137.0L548.0 14.0" and second["d"] == "M548.0 14.0"
    assert [(d["cx"], d["cy"], d["r"]) for d in drawn(svg, "circle", "dot line1")] == [
        ("48.0", "260.0", "2.5"), ("298.0", "137.0", "2.5"), ("548.0", "14.0", "2.5")
    ]  # fmt: skip
    assert [g["d"] for g in drawn(svg, "path", "grid")] == [f"M48 {y}H548" for y in (260.0, 198.5, 137.0, 75.5, 14.0)]
    assert [m["d"] for m in drawn(svg, "path", "mark")] == ["M298.0 14V260"]
    words = [(t["x"], t["y"], t.get("text-anchor"), t["text"]) for t in drawn(svg, "text", "tick")]
    assert words == [
        *(("42", f"{y}", "end", label) for y, label in zip((264.0, 202.5, 141.0, 79.5, 18.0), "01234", strict=True)),
        *((f"{x}", "276", "middle", f"{t}") for x, t in ((48.0, 0), (148.0, 2), (248.0, 4), (348.0, 6), (448.0, 8),
                                                        (548.0, 10))),
        ("303.0", "26", "start", "formed"),
        ("304.0", "294", "middle", "epoch"),
    ]  # fmt: skip
    names = figures.legend([LINE, other])
    assert names == (
        '<p class="legend"><span><i class="swatch line1"></i>dev &amp; co</span>'
        '<span><i class="swatch line2"></i>x</span></p>'
    )


def test_a_mark_on_the_right_has_its_label_on_the_left():
    for at, anchor, x in ((6.0, "start", 353.0), (6.1, "end", 348.0), (99.0, "end", 543.0)):
        svg = figures.curves_svg([LINE], x_label="x", y_label="y", mark=(at, "formed"))
        (name,) = [t for t in drawn(svg, "text", "tick") if t["text"] == "formed"]
        assert name["text-anchor"] == anchor and float(name["x"]) == pytest.approx(x)


def test_ticks_beyond_the_last_point_are_not_drawn_and_many_points_have_no_dots():
    svg = figures.curves_svg([figures.Curve("a", "line1", [0, 7], [1.0, 1.0])], x_label="x", y_label="y")
    assert [t["text"] for t in drawn(svg, "text", "tick") if t["y"] == "276"] == ["0", "2", "4", "6"]
    for count, dots in ((60, 60), (61, 0)):
        many = figures.Curve("a", "line1", range(count), [1.0] * count)
        assert len(drawn(figures.curves_svg([many], x_label="x", y_label="y"), "circle", "dot line1")) == dots
    at_start = figures.curves_svg([figures.Curve("a", "line1", [0], [1.0])], x_label="x", y_label="y")
    assert drawn(at_start, "path", "curve line1")[0]["d"].startswith("M48.0 ")


def test_long_curves_are_means_over_equal_parts():
    rows = [{"epoch": float(i), "loss": float(i % 2)} for i in range(240)]
    curve = report.smooth("loss", "line1", rows, "loss")
    assert curve.x == [2 * i + 0.5 for i in range(120)] and curve.y == [0.5] * 120
    assert report.smooth("loss", "line1", rows[:3], "loss").x == [0.0, 1.0, 2.0]
    assert len(report.smooth("loss", "line1", rows, "loss", count=7).x) == 7
    assert report.smooth("loss", "line1", [], "loss").x == []


def test_a_folder_without_a_log_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="has no log.jsonl, so it is not a run folder"):
        report.write_report(tmp_path, tmp_path / "r.html", title="x")
    assert not (tmp_path / "r.html").exists()


def test_a_step_without_a_loss_is_omitted_from_the_curve():
    rows = [{"epoch": 1.0, "loss": None}, {"epoch": 2.0}, {"epoch": 3.0, "loss": 4.0}, {"epoch": 4.0, "loss": math.nan}]
    curve = report.smooth("loss", "solid", rows, "loss")
    assert (curve.x, curve.y) == ([3.0], [4.0])


def test_the_page_shows_command_commit_machine_and_date_of_each_start(tmp_path, fake_drawing):
    run = write_run(tmp_path / "run")
    write_start(run, ["--out", "<run>"], step=0, resumed=False, device="cpu")
    write_start(run, ["--resume"], step=7, resumed=True, device="cpu")
    report.write_report(run, tmp_path / "r.html", title="x")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "python -m las_fast.train --out &#x27;&lt;run&gt;&#x27;" in page and "from step 7" in page
    for value in (read_starts(run)[0][name] for name in ("machine", "commit", "version")):
        assert html.escape(value) in page
    assert page.count(" UTC<br>") == 2


def test_a_training_without_decoding_shows_its_best_validation_speed_and_memory(tmp_path, fake_drawing):
    run = write_run(tmp_path / "run", epochs=4)
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()[:-1]]
    for i, row in enumerate(rows):
        row |= {"peak_gib": 0.25 * (i + 1)} if row["kind"] == "valid" else {"speed": 10.0 * (i + 1), "waiting": 0.5}
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report.write_report(run, tmp_path / "r.html", title="x")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    tiles = re.findall(r"<b>(.*?)</b><span>(.*?)</span>", page)
    assert tiles == [("22.50 %", "CER"), ("24.75 %", "WER"), ("2.25", "LD"), ("4", "epochs"), ("40 ×", "speed"),
                     ("2.0 GiB", "memory")]  # fmt: skip
    memory = page[page.index("Memory of the training process") :]
    assert memory.count("<circle") == 4 and "Time waiting for data, percent" in page


def test_settings_of_another_version_are_shown_as_they_are(tmp_path, fake_drawing):
    run = write_run(tmp_path / "run")
    (run / "config.yaml").write_text("settings_of_1999: 1\n")
    report.write_report(run, tmp_path / "r.html", title="x")
    assert "settings_of_1999: 1" in (tmp_path / "r.html").read_text(encoding="utf-8")
    assert fake_drawing[0][1]["frame_seconds"] is None


def test_a_page_is_recognised_as_a_report(tmp_path, fake_drawing):
    make(tmp_path)
    assert report.is_report(tmp_path / "report.html")
    (tmp_path / "other.html").write_text("<!doctype html>\n<p>mine")
    assert not report.is_report(tmp_path / "other.html")
