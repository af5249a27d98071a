"""benchmarks.scores and benchmarks.robustness show several checkpoints side by side, each with its own numbers."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_checkpoints import MODEL, make_checkpoint
from tiny_corpora import make_manifest

from benchmarks import robustness, scores
from benchmarks.rows import read_rows
from benchmarks.side_by_side import labels, load_checkpoints, relative_change, score_table
from las_fast import lm
from las_fast.config import DataConfig, DecodingConfig, FeatureConfig
from las_fast.data.normalisation import Statistics
from las_fast.errors import InputError

CTC = {"model": replace(MODEL, ctc_layer=0)}
WAYS = ["greedy", "beam", "beam, CTC", "beam, language model", "beam, CTC, language model"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Recordings, and checkpoints: CTC and a language model (full), either, neither (bare), and 8 kHz (narrow)."""
    root = tmp_path_factory.mktemp("side-by-side")
    manifest = make_manifest(root / "data", utterances=4)
    lines = manifest.read_text().splitlines()
    manifest.write_text("\n".join(line.replace("made", f"part-{i % 2}") for i, line in enumerate(lines)) + "\n")
    kinds = {"full": (0.3, 0.2), "bare": (0, 0), "ctc": (0.3, 0), "lm": (0, 0.2), "narrow": (0, 0)}
    for size, (name, (ctc_weight, ngram_weight)) in enumerate(kinds.items(), 16):
        (root / name).mkdir()
        decoding = DecodingConfig(beam=3, ctc_weight=ctc_weight, ngram_weight=ngram_weight)
        rate = 8000 if name == "narrow" else 16000
        sections = (CTC if ctc_weight else {}) | {"decoding": decoding}
        path = make_checkpoint(root / name, size, mel_bins=23, sample_rate=rate, sections=sections)
        path.rename(root / f"{name}.safetensors")
        if ngram_weight:
            lm.main([str(root / "data"), "--out", str(root / f"{name}.lm.safetensors"), "--order", "2"])
    return root


def run(module, corpus, names, *options, data=("--by", "source")):
    checkpoints = [str(corpus / f"{name}.safetensors") for name in names]
    module.main(["--checkpoint", *checkpoints, "--data", str(corpus / "data"), "--split", "dev", *data, *options])


def cells(printed):
    """Return the lines of the printed tables as lists of cells, without the lines of dashes."""
    lines = [line[2:-2].split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line] for line in lines]


def recorded(path):
    """Return the rows of a file without date and commit."""
    return [{key: value for key, value in row.items() if key not in ("date", "commit")} for row in read_rows(path)]


# ---------------------------------------------------------------------------------------------------------------- table


CERS = {("a", "clean", "all"): 20.0, ("a", "clean", "x"): 0.0, ("b", "clean", "all"): 30.0,
        ("c", "clean", "all"): 15.0, ("c", "clean", "x"): 5.0, ("c", "noise", "all"): 40.0,
        ("a", "rooms", "all"): 10.0}  # fmt: skip


def table(checkpoints, rows):
    return score_table("CER", CERS, lambda key: f"{CERS[key]:.1f}", checkpoints=checkpoints, rows=rows,
                       parts=["all", "x"])  # fmt: skip


def test_several_checkpoints_have_a_line_each_and_a_line_of_changes():
    assert table(["a", "b", "c"], ["clean", "noise"]).splitlines() == [
        "| CER | checkpoint | all | x |",
        "|---|---|---|---|",
        "| clean | a | 20.0 | 0.0 |",
        "| clean | b | 30.0 |  |",
        "| clean | c | 15.0 | 5.0 |",
        "| clean | change | -25.0% |  |",
        "| noise | a |  |  |",
        "| noise | b |  |  |",
        "| noise | c | 40.0 |  |",
        "| noise | change |  |  |",
    ]


def test_one_checkpoint_has_a_line_per_row():
    assert table(["a"], ["clean", "rooms"]).splitlines() == [
        "| CER | all | x |", "|---|---|---|", "| clean | 20.0 | 0.0 |", "| rooms | 10.0 |  |"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [(20.0, 15.0, "-25.0%"), (8.0, 9.0, "+12.5%"), (8.0, 8.0, "+0.0%"), (8.0, 0.0, "-100.0%"), (0.0, 8.0, ""),
     (0.0, 0.0, ""), (None, 8.0, ""), (8.0, None, "")],
)  # fmt: skip
def test_the_change_is_relative_to_the_first(first, last, expected):
    assert relative_change(first, last) == expected


@pytest.mark.parametrize("module", [scores, robustness])
def test_a_checkpoint_given_twice_is_refused(module, corpus, monkeypatch):
    monkeypatch.chdir(corpus)
    argv = ["--checkpoint", "bare.safetensors", "full.safetensors", "--data", "data"]
    with pytest.raises(InputError, match=r"bare.safetensors and .*/bare.safetensors are the same file, .*; give each"):
        module.main([*argv, "--checkpoint", str(corpus / "bare.safetensors")])
    with pytest.raises(InputError, match="checkpoint nowhere is neither a run folder nor a file"):
        module.main(["--checkpoint", "bare.safetensors", "nowhere", "--data", "data"])


def test_checkpoints_are_loaded_in_the_order_given(corpus):
    names = [str(corpus / f"{name}.safetensors") for name in ("lm", "bare")]
    assert [loaded.config.features.size for loaded in load_checkpoints(names)] == [19, 17]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["an4", "runs/new", "a/old.safetensors"], ["an4", "new", "old"]),
        (["runs/v1.0/", "runs/v1.1/best.safetensors"], ["v1.0", "best"]),
        (["a/best.safetensors", "an4", "b/best.safetensors"], ["a/best.safetensors", "an4", "b/best.safetensors"]),
    ],
)
def test_labels_are_short_and_different(names, expected):
    assert labels(names) == expected


# --------------------------------------------------------------------------------------------------------------- scores


def test_scores_of_several_checkpoints_are_those_of_each_alone(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scores, "FILE", tmp_path / "alone.csv")
    for name in ("full", "bare"):
        run(scores, corpus, [name], "--beam", "3", "--record")
    capsys.readouterr()
    monkeypatch.setattr(scores, "FILE", tmp_path / "together.csv")
    run(scores, corpus, ["full", "bare"], "--beam", "3", "--record")
    printed = capsys.readouterr().out
    rows = recorded(tmp_path / "together.csv")
    assert rows == recorded(tmp_path / "alone.csv") and len(rows) == 3 * (5 + 2)
    assert [row["checkpoint"] for row in rows] == ["full"] * 15 + ["bare"] * 6
    assert printed.endswith("texts that differ when an utterance is decoded alone: full 0, bare 0\n")

    values = {(row["checkpoint"], row["way"], row["part"]): (float(row["cer"]), float(row["ld"])) for row in rows}
    names = ["all", *dict.fromkeys(row["part"] for row in rows if row["part"] != "all")]
    expected = [["CER, % / LD", "checkpoint", *names]]
    for way in WAYS:
        pairs = [[values.get((name, way, part)) for part in names] for name in ("full", "bare")]
        for name, pair in zip(("full", "bare"), pairs, strict=True):
            expected.append([way, name, *("{:.2f} / {:.2f}".format(*one) if one else "" for one in pair)])
        changes = [f"{100 * (b[0] - a[0]) / a[0]:+.1f}%" if b else "" for a, b in zip(*pairs, strict=True)]
        expected.append([way, "change", *changes])
    assert cells(printed) == expected
    assert values["full", "greedy", "all"] != values["bare", "greedy", "all"]  # so the change above is not 0


def test_decodings_that_only_one_checkpoint_has_are_in_the_usual_order(corpus, capsys):
    run(scores, corpus, ["lm", "ctc"], "--beam", "2", data=())
    lines = cells(capsys.readouterr().out)[1:]
    assert list(dict.fromkeys(line[0] for line in lines)) == WAYS[:4]
    blank = {(way, name) for way, name, cell in lines if not cell}
    missing = {("beam, CTC", "lm"), ("beam, language model", "ctc")}
    assert blank == missing | {("beam, CTC", "change"), ("beam, language model", "change")}


def test_a_checkpoint_without_the_selected_decodings_has_an_empty_line(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scores, "FILE", tmp_path / "rows.csv")
    run(scores, corpus, ["bare", "ctc"], "--ways", "2", "--record", data=())
    printed = capsys.readouterr().out
    title, bare, ctc, change = cells(printed)
    assert title == ["CER, % / LD", "checkpoint", "all"] and bare == ["beam, CTC", "bare", ""]
    assert ctc[:2] == ["beam, CTC", "ctc"] and ctc[2] and change == ["beam, CTC", "change", ""]
    (row,) = recorded(tmp_path / "rows.csv")
    assert (row["checkpoint"], row["way"]) == ("ctc", "beam, CTC") and "bare 0, ctc 0" in printed
    with pytest.raises(InputError, match=r"--ways takes indices from 0 to 2 \(0: greedy; 1: beam; 2: beam, CTC\); got"):
        run(scores, corpus, ["bare", "ctc"], "--ways", "3")


def test_each_checkpoint_is_decoded_with_its_own_weights_and_language_model_or_with_lm(corpus):
    options = {"beam": [4], "backend": "auto", "ways": None, "lm": None}
    options["checkpoint"] = [str(corpus / f"{name}.safetensors") for name in ("bare", "lm")]
    (bare, other), names = scores.prepare(SimpleNamespace(**options))
    assert list(bare.settings) == WAYS[:2] and bare.ngram is None
    assert list(other.settings) == names == [WAYS[0], WAYS[1], WAYS[3]] and other.ngram is not None
    assert other.settings["beam, language model"].ngram_weight == 0.2 and other.settings["beam"].ngram_weight == 0
    entries, _ = scores.prepare(SimpleNamespace(**options | {"lm": str(corpus / "lm.lm.safetensors")}))
    assert [one.settings["beam, language model"].ngram_weight for one in entries] == [0.1, 0.2]
    assert all(torch.equal(one.ngram.rows, other.ngram.rows) for one in entries)


def test_several_beams_are_in_the_names_of_the_decodings():
    full = DecodingConfig(beam=5, ctc_weight=0.3, ngram_weight=0.2, length_reward=0.4, speeds=(0.8, 1.0))
    full = replace(full, view_threshold=0.5)
    settings = scores.decodings(full, [8, 16])
    assert list(settings) == ["greedy", *(way.replace("beam", f"beam {beam}") for way in WAYS[1:] for beam in (8, 16))]
    assert settings["beam 16, CTC, language model"] == replace(full, beam=16)
    others = replace(full, view_threshold=0.0)
    assert settings["beam 8, CTC"] == replace(others, beam=8, ngram_weight=0, length_reward=0)
    assert settings["beam 16, language model"] == replace(others, beam=16, ctc_weight=0)
    assert {name for name, one in settings.items() if one.speeds != (0.8, 1.0)} == {"greedy"}
    assert list(scores.decodings(full, [16])) == WAYS and scores.decodings(full, [16])["beam"].beam == 16


def test_several_beams_are_scored_as_each_alone(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(scores, "FILE", tmp_path / "rows.csv")
    run(scores, corpus, ["full"], "--beam", "1", "9", "1", "--record", data=())
    run(scores, corpus, ["full"], "--beam", "9", "--record", data=())
    rows = {row.pop("way"): row for row in recorded(tmp_path / "rows.csv")[:9]}
    alone = {row.pop("way"): row for row in recorded(tmp_path / "rows.csv")[9:]}
    assert list(rows) == list(scores.decodings(DecodingConfig(ctc_weight=0.3, ngram_weight=0.2), [1, 9]))
    assert rows["beam 1"] == rows["greedy"] == alone["greedy"] and list(alone) == WAYS
    assert all(rows[way.replace("beam", "beam 9")] == alone[way] for way in WAYS[1:])
    assert rows["beam 1, language model"]["cer"] != rows["beam 9, language model"]["cer"]


def test_scores_against_different_texts_come_with_a_warning(corpus, tmp_path, capsys):
    characters = "ABCDEFGHIJKLM "
    data = DataConfig(characters=characters, normalise_text=True)
    path = make_checkpoint(tmp_path, 16, mel_bins=23, sections={"data": data})
    argv = ["--checkpoint", str(corpus / "bare.safetensors"), str(path), "--data", str(corpus / "data")]
    scores.main([*argv, "--ways", "0"])
    warning = "warning: bare and untrained-16 are scored against different texts"
    assert warning in capsys.readouterr().err
    run(scores, corpus, ["bare", "full"], "--ways", "0")
    assert "warning" not in capsys.readouterr().err


def test_scores_on_different_utterances_are_refused(corpus, tmp_path):
    text = "id\tpath\ttranscript\tsplit\n" + "".join(
        f"{i}\t{corpus}/data/audio/dev-{i}.wav\t{text}\tdev\n" for i, text in enumerate(("A B", "A Z"))
    )
    (tmp_path / "manifest.tsv").write_text(text)
    path = make_checkpoint(tmp_path, 16, mel_bins=23, sections={"data": DataConfig(characters="AB ", on_bad="skip")})
    argv = ["--checkpoint", str(corpus / "bare.safetensors"), str(path), "--data", str(tmp_path / "manifest.tsv")]
    with pytest.raises(InputError, match="^bare is scored on 2 utterances and untrained-16 on 1, because data.on_bad"):
        scores.main([*argv, "--split", "dev"])


# ----------------------------------------------------------------------------------------------------------- robustness


def test_robustness_of_several_checkpoints_is_that_of_each_alone(corpus, tmp_path, monkeypatch, capsys):
    names, conditions = ["full", "bare"], ["--conditions", "reverberant", "clean", "--ways", "greedy", "best"]
    monkeypatch.setattr(robustness, "FILE", tmp_path / "alone.csv")
    for name in names:
        run(robustness, corpus, [name], *conditions, "--record")
    capsys.readouterr()
    monkeypatch.setattr(robustness, "FILE", tmp_path / "together.csv")
    run(robustness, corpus, names, *conditions, "--record")
    printed = capsys.readouterr().out
    rows = recorded(tmp_path / "together.csv")
    assert rows == recorded(tmp_path / "alone.csv") and len(rows) == 2 * 2 * 2 * 3
    assert "clean, best, bare: CER " in printed and "sample rates" not in printed

    given = {name: f"{corpus.name}/{name}.safetensors" for name in names}  # rows have the last two parts of a path
    assert [row["checkpoint"] for row in rows] == [given["full"]] * 12 + [given["bare"]] * 12
    values = {(row["checkpoint"], row["way"], row["condition"], row["part"]): float(row["cer"]) for row in rows}
    parts = ["all", *dict.fromkeys(row["part"] for row in rows if row["part"] != "all")]
    expected = []
    for way in ("greedy", "best"):
        expected.append([f"CER, %, {way}", "checkpoint", *parts])
        for condition in ("clean", "reverberant"):
            cers = [[values[given[name], way, condition, part] for part in parts] for name in names]
            for name, some in zip(names, cers, strict=True):
                clean = [values[given[name], way, "clean", part] for part in parts]
                multiples = [f"{x:.2f} (x {x / y:.2f})" for x, y in zip(some, clean, strict=True)]
                expected.append([condition, name, *multiples])
            changes = [f"{100 * (new - old) / old:+.1f}%" for old, new in zip(*cers, strict=True)]
            expected.append([condition, "change", *changes])
    assert cells(printed) == expected


def test_robustness_gives_the_language_model_of_the_option_to_every_checkpoint(corpus):
    options = SimpleNamespace(lm=str(corpus / "lm.lm.safetensors"), ways=["greedy", "best"])
    options.checkpoint = [str(corpus / f"{name}.safetensors") for name in ("bare", "lm")]
    entries = robustness.prepare(options)
    assert [entry.ways["best"][0].ngram_weight for entry in entries] == [0.1, 0.2]
    for entry in entries:
        assert entry.ways["best"][1] is not None and entry.ways["greedy"][1] is None


def test_recordings_are_read_and_changed_once_per_sample_rate(corpus, monkeypatch, capsys):
    read, heard = [], []
    load_audio, changed = robustness.load_audio, robustness.changed
    monkeypatch.setattr(
        robustness, "load_audio", lambda path, rate, **o: read.append(rate) or load_audio(path, rate, **o)
    )
    monkeypatch.setattr(robustness, "changed", lambda r, u, i, c: heard.append((r.rate, c, i)) or changed(r, u, i, c))
    run(robustness, corpus, ["bare", "narrow", "ctc"], "--conditions", "10 dB", "clean", data=())
    assert sorted(read) == [8000] * 4 + [16000] * 4
    assert sorted(heard) == sorted((rate, c, i) for rate in (8000, 16000) for c in ("10 dB", "clean") for i in range(4))
    printed = capsys.readouterr().out
    assert "checkpoints with different sample rates, 8000, 16000 Hz, get different noise" in printed
    assert [line[1] for line in cells(printed)[1:5]] == ["bare", "narrow", "ctc", "change"]


def test_models_share_inputs_only_if_their_features_and_statistics_are_equal(corpus):
    utterances = [SimpleNamespace(id="a"), SimpleNamespace(id="b")]
    waves = [torch.randn(8000, generator=torch.Generator().manual_seed(i)).numpy() * 0.1 for i in range(2)]
    recordings = robustness.Recordings(16000, waves, [0.01, 0.01])
    (loaded,) = load_checkpoints([str(corpus / "bare.safetensors")])
    features = FeatureConfig(kind="mfcc", size=17, mel_bins=23, normalisation="global", trim_silence=False)
    common = loaded._replace(config=replace(loaded.config, features=features))
    statistics = [Statistics(torch.full((17,), float(mean)), torch.full((17,), 2.0)) for mean in (0, 0, 6)]
    models = [loaded, *(common._replace(statistics=one) for one in statistics)]
    own, zero, again, six = robustness.make_datasets(models, recordings, utterances, "clean")
    assert zero is again and own is not zero and six is not zero and own.ids == ["a", "b"]
    torch.testing.assert_close(six[1], zero[1] - 3)
    torch.testing.assert_close(own[1].mean(0), torch.zeros(17), atol=1e-5, rtol=0)
    assert list(six.seconds) == [0.5, 0.5]
