"""benchmarks.ablation: each training differs from the preset in what its name says."""

import sys
from pathlib import Path

import pytest
from tiny_corpora import make_manifest

from benchmarks import ablation
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
    "four-layers": {"model.listener.top_layers", "model.ctc_layer"},
}


def options(out, *more, data="m.tsv"):
    return ablation.parse(["--data", str(data), "--init", "given", "--out", str(out), *more])


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
    ("text", "message"),
    [
        ("id\tpath\nx\ta.wav\n", "has no rows with path, split and source; give a TSV manifest"),
        ("", "has no rows with path, split and source"),
        (
            "path\tsplit\tsource\na.wav\ttrain\tmine\n",
            "has no training row of the sources x, y; leave out this variant",
        ),
    ],
)
def test_a_manifest_without_sources_is_a_one_sentence_error(tmp_path, text, message):
    (tmp_path / "m.tsv").write_text(text)
    with pytest.raises(InputError, match=message):
        ablation.write_manifest(tmp_path / "m.tsv", tmp_path / "out.tsv", ("x", "y"))
    assert not (tmp_path / "out.tsv").exists()


def test_trainings_run_and_are_summarised(tmp_path, monkeypatch, capsys):
    program = "import sys; print('output of', sys.argv[1])"
    monkeypatch.setattr(ablation, "command", lambda name, _: [sys.executable, "-c", program, name])
    row = ["x"] * len(ablation.recognition.COLUMNS)
    monkeypatch.setattr(ablation.recognition, "summary_row", lambda run, *, what, data: row)
    ablation.main(
        ["--data", "m", "--init", "x", "--out", str(tmp_path), "--jobs", "2", "--variants", "whole", "no-warp"]
    )
    assert (tmp_path / "no-warp.log").read_text() == "output of no-warp\n"
    assert capsys.readouterr().out.endswith("no-warp: CER x%, without shifted frequencies\n")


def test_a_training_that_fails_is_named_with_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "command", lambda *_: [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(InputError, match=r"the training whole ended with status 3; .*whole.log says why"):
        ablation.main(["--data", "m", "--init", "x", "--out", str(tmp_path), "--variants", "whole"])
