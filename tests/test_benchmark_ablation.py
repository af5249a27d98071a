"""benchmarks.ablation: each training differs from the preset in what its name says."""

import sys
from pathlib import Path

import pytest
from tiny_corpora import make_archive, make_manifest

from benchmarks import ablation
from benchmarks.rows import read_rows
from las_fast import train
from las_fast.data.layouts import open_corpus
from las_fast.errors import InputError
from las_fast.files import LAST
from las_fast.tree import flatten, to_tree

CHANGES = {  # settings in which each training differs from "whole"
    "whole": set(),
    "old-data": set(),
    "no-noise": {"augment.noise", "augment.babble"},
    "no-rooms": {"augment.room", "augment.band_limit", "augment.silence"},
    "no-warp": {"augment.warp"},
    "no-masks": {"augment.time_masks", "augment.frequency_masks"},
    "no-top-ctc": {"model.ctc_layer", "model.inner_ctc_layer"},
    "synthetic": set(),
    "four-layers": {"model.listener.top_layers", "model.ctc_layer"},
}


def options(out, *more, data="m.tsv"):
    words = ["--data", str(data), "--extra-data", "speech", "more", "--init", "given", "--out", str(out)]
    return ablation.parse([*words, *more])


def settings(out, name, data):
    words = ablation.command(name, options(out, data=data))
    assert words[:3] == [sys.executable, "-m", "las_fast.train"]
    given, config = train.parse(words[3:])
    return given, dict(flatten(to_tree(config)))


@pytest.mark.parametrize("name", ablation.VARIANTS)
def test_a_training_differs_in_its_part_alone(tmp_path, name):
    data = make_manifest(tmp_path)
    data.write_text(data.read_text().replace("made", "speechocean762"))
    given, own = settings(tmp_path, name, data)
    _, whole = settings(tmp_path, "whole", data)
    assert {key for key in whole if whole[key] != own[key]} == CHANGES[name]
    assert (given.init, given.out) == ("given", tmp_path / name)
    assert given.data == (tmp_path / "old-data.tsv" if name == "old-data" else data)
    assert given.extra_data == ([Path("speech"), Path("more")] if name == "synthetic" else [])
    assert (own["training.epochs"], own["training.validate_every"], own["training.threads"]) == (4, 4.0, 1)


def test_a_begun_training_is_resumed(tmp_path):
    assert "--resume" not in ablation.command("whole", options(tmp_path))
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / LAST).touch()
    assert ablation.command("whole", options(tmp_path))[-1] == "--resume"


def test_the_manifest_of_some_sources_has_their_training_rows_and_all_of_dev(tmp_path):
    data = make_manifest(tmp_path / "data")
    lines = data.read_text().splitlines()
    lines[2] = lines[2].replace("made", "other")  # the second training utterance
    data.write_text("\n".join(lines) + "\n")
    corpus = open_corpus(ablation.write_manifest(data, tmp_path / "some.tsv", ("other",)))
    assert [u.id for u in corpus.utterances("train")] == ["train-1"]
    assert [u.id for u in corpus.utterances("dev")] == [f"dev-{i}" for i in range(4)]
    assert all(Path(u.path).is_file() and not u.problem for u in corpus.utterances("dev"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("source", "origin"), "is not a manifest of whole recordings with the column source; leave out old-data"),
        (("made", "other"), "has no utterance of the sources made; leave out old-data"),
    ],
)
def test_a_manifest_without_the_sources_is_a_one_sentence_error(tmp_path, change, message):
    data = make_manifest(tmp_path)
    data.write_text(data.read_text().replace(*change))
    with pytest.raises(InputError, match=message):
        ablation.write_manifest(data, tmp_path / "out.tsv", ("made",))
    assert not (tmp_path / "out.tsv").exists()


def test_an_archive_has_no_sources(tmp_path):
    with pytest.raises(InputError, match="is not a manifest of whole recordings"):
        ablation.write_manifest(make_archive(tmp_path, "F23"), tmp_path / "out.tsv", ("made",))


@pytest.fixture
def programs(monkeypatch, tmp_path):
    """Trainings are small programs: by name, their source. Their summaries are (run, what, data, ...)."""
    sources = {}
    monkeypatch.setattr(ablation, "command", lambda name, _: [sys.executable, "-c", sources[name]])
    monkeypatch.setattr(ablation.recognition, "FILE", tmp_path / "recognition.csv")

    def summary(run, *, what, data):
        row = dict.fromkeys(ablation.recognition.COLUMNS, "x") | {"run": run.name, "what": what, "data": data}
        return tuple((row | {"cer_last": "12.34"}).values())

    monkeypatch.setattr(ablation.recognition, "summary_row", summary)
    return sources


def call(tmp_path, *more):
    ablation.main(["--data", "m", "--init", "x", "--out", str(tmp_path / "runs"), *more])


def test_trainings_run_and_are_recorded_once(tmp_path, programs, capsys):
    programs |= {"whole": "print('first')", "no-warp": "print('second')"}
    for _ in range(2):
        call(tmp_path, "--jobs", "2", "--variants", "whole", "no-warp", "--record")
    assert (tmp_path / "runs" / "no-warp.log").read_text() == "second\nsecond\n"
    assert "no-warp: CER 12.34%, without shifted frequencies\n" in capsys.readouterr().out
    rows = read_rows(tmp_path / "recognition.csv")
    assert sorted((row["run"], row["what"], row["cer_last"]) for row in rows) == [
        ("no-warp", "preset english for 4 epochs: without shifted frequencies", "12.34"),
        ("whole", "preset english for 4 epochs: nothing is left out", "12.34"),
    ]


def test_a_training_that_fails_stops_the_others(tmp_path, programs):
    begun = tmp_path / "begun"
    wait = f"import time; open({str(begun)!r}, 'w').close(); time.sleep(600)"
    fail = f"import os, time\nwhile not os.path.exists({str(begun)!r}): time.sleep(0.01)\nraise SystemExit(3)"
    queued = "import time; time.sleep(600)"
    programs |= {"whole": wait, "no-noise": fail, "no-warp": queued, "no-masks": queued, "no-rooms": queued}
    with pytest.raises(InputError, match=r"the training no-noise ended with status 3; .*no-noise.log says why"):
        call(tmp_path, "--jobs", "2", "--variants", *programs, "--record")
    assert not (tmp_path / "recognition.csv").exists()


def test_a_training_that_is_complete_is_recorded_though_another_fails(tmp_path, programs):
    fail = "raise SystemExit(3)"
    programs |= {"whole": "", "no-noise": fail}
    with pytest.raises(InputError, match="the training no-noise ended with status 3"):
        call(tmp_path, "--variants", *programs, "--record")
    assert [row["run"] for row in read_rows(tmp_path / "recognition.csv")] == ["whole"]


def test_no_training_starts_if_one_is_impossible(tmp_path):
    data = make_manifest(tmp_path)
    data.write_text(data.read_text().replace("source", "origin"))
    with pytest.raises(InputError, match="leave out old-data"):
        list(ablation.train_all(options(tmp_path, "--variants", "whole", "old-data", data=data)))
    assert not (tmp_path / "whole.log").exists()


def test_synthetic_speech_needs_extra_data(tmp_path, programs):
    assert "synthetic" not in ablation.parse(["--data", "m", "--init", "x", "--out", "runs"]).variants
    assert options(tmp_path).variants == list(ablation.VARIANTS)
    with pytest.raises(InputError, match="the variant synthetic needs --extra-data"):
        call(tmp_path, "--variants", "synthetic")


def test_jobs_must_be_at_least_1(tmp_path, programs):
    with pytest.raises(InputError, match="--jobs must be at least 1; got 0"):
        call(tmp_path, "--jobs", "0")
