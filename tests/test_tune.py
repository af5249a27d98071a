"""The tune command: the grid, its output, and its errors."""

import csv
import shutil
from argparse import Namespace
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import MODEL, make_checkpoint
from tiny_corpora import make_archive, make_manifest

from las_fast import lm, tune
from las_fast.checkpoint import load_model
from las_fast.config import DataConfig, DecodingConfig
from las_fast.errors import InputError, NotFinite
from las_fast.search import ngram
from las_fast.search.beam import beam_search
from las_fast.splits import open_split


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with recordings, a checkpoint with a CTC head for them, and a language model."""
    folder = tmp_path_factory.mktemp("tune")
    make_manifest(folder / "data", utterances=3)
    make_checkpoint(folder, 20, mel_bins=23, sections={"model": replace(MODEL, ctc_layer=0)})
    lm.main([str(folder / "data"), "--out", str(folder / "lm.safetensors"), "--order", "2"])
    return folder


def argv(workspace, *more):
    checkpoint, data = workspace / "untrained-20.safetensors", workspace / "data"
    return ["--checkpoint", str(checkpoint), "--data", str(data), "--device", "cpu", *map(str, more)]


def test_the_grid_holds_every_combination_and_keeps_the_other_settings():
    start = DecodingConfig(beam=3, maximum_extra=7)
    options = Namespace(beam=[1, 2], length_penalty=[0.5, 1.0, 2.0])
    actual = tune.grid(options, ["beam", "length_penalty"], start)
    expected = [(beam, penalty) for beam in (1, 2) for penalty in (0.5, 1.0, 2.0)]
    assert [(x.beam, x.length_penalty) for x in actual] == expected
    assert {x.maximum_extra for x in actual} == {7}


def test_a_grid_has_at_most_ten_thousand_combinations():
    names = ["beam", "length_penalty"]
    actual = tune.grid(Namespace(beam=range(1, 101), length_penalty=range(100)), names, DecodingConfig())
    assert len(actual) == 10_000
    with pytest.raises(InputError, match="make 10100 combinations; give values for at most 10000"):
        tune.grid(Namespace(beam=range(1, 102), length_penalty=range(100)), names, DecodingConfig())


def test_options_have_their_types_and_each_setting_of_the_grid_has_one():
    argv = ["--checkpoint", "x", "--data", "y"]
    values = [f"--{name.replace('_', '-')}={i}" for i, name in enumerate(tune.GRID, 1)]
    options = tune.parser().parse_args([*argv, *values])
    assert [getattr(options, name) for name in tune.GRID] == [[1], [2.0], [3.0], [4.0], [5.0], [6.0], [7.0], [8.0]]
    assert [type(getattr(options, name)[0]) for name in tune.GRID] == [int, *[float] * 7]
    assert tune.parser().parse_args([*argv, "--beam", "1", "2"]).beam == [1, 2]
    plain = tune.parser().parse_args(argv)
    assert (plain.data, plain.split, plain.device, plain.lm, plain.out) == (Path("y"), None, "auto", None, None)
    assert not any(getattr(plain, name) for name in tune.GRID)


@pytest.mark.parametrize("missing", ["--checkpoint", "--data"])
def test_checkpoint_and_data_are_required(missing, capsys):
    required = {"--checkpoint": "x", "--data": "y"}
    del required[missing]
    with pytest.raises(SystemExit):
        tune.parser().parse_args([word for pair in required.items() for word in pair])
    assert f"{missing} must be given" in capsys.readouterr().err


def test_a_table_name_with_a_trailing_slash_is_refused(capsys):
    with pytest.raises(SystemExit):
        tune.parser().parse_args(["--checkpoint", "x", "--data", "y", "--out", "table/"])
    assert "table/ is a folder; give the name of a file to write" in capsys.readouterr().err


def test_settings_are_ranked_by_cer_and_equal_ones_stay_in_order():
    settings = [DecodingConfig(beam=beam) for beam in (1, 2, 3, 4)]
    texts = [["AB X", "C"], ["AB", "C"], ["AB X", "C"], ["AB CD", "C"]]
    order, rows = tune.rank(["beam"], settings, ["AB CD", "C"], texts)
    assert order == [3, 0, 2, 1]
    assert rows == [
        ["beam", "cer", "wer", "ld"],
        ["4", "0.000", "0.000", "0.000"],
        ["1", "33.333", "33.333", "1.000"],
        ["3", "33.333", "33.333", "1.000"],
        ["2", "50.000", "33.333", "1.500"],
    ]


@pytest.fixture
def ranking(monkeypatch):
    """A list in which the test puts the order of the ranked settings."""
    order = []

    def fake_rank(names, settings, references, texts):
        rows = [[f"{getattr(settings[i], name):g}" for name in names] + ["1.000", "2.000", "3.000"] for i in order]
        return order, [[*names, "cer", "wer", "ld"], *rows]

    monkeypatch.setattr(tune, "rank", fake_rank)
    return order


def test_the_table_is_printed_and_the_last_line_has_the_options_for_decode(workspace, ranking, capsys, tmp_path):
    ranking += [1, 0]
    file = ["--lm", workspace / "lm.safetensors"]
    tune.main(argv(workspace, "--beam", 2, "--ngram-weight", 0, 0.5, *file, "--out", tmp_path / "grid.csv"))
    lines = capsys.readouterr().out.splitlines()
    rows = [["beam", "ngram_weight", "cer", "wer", "ld"], ["2", "0.5", "1.000", "2.000", "3.000"],
            ["2", "0", "1.000", "2.000", "3.000"]]  # fmt: skip
    assert lines[0] == "3 utterances of dev"
    assert lines[1:4] == ["".join(f"{cell:>16}" for cell in row) for row in rows]
    assert lines[4:] == [f"best: --decoding.beam 2 --decoding.ngram-weight 0.5 --lm {workspace / 'lm.safetensors'}"]
    assert (tmp_path / "grid.csv").read_bytes() == "".join(",".join(row) + "\n" for row in rows).encode()


def test_the_last_line_names_a_language_model_only_if_it_has_a_weight(workspace, ranking, capsys):
    ranking += [0, 1]
    tune.main(argv(workspace, "--ngram-weight", 0, 0.5, "--lm", workspace / "lm.safetensors"))
    assert capsys.readouterr().out.splitlines()[-1] == "best: --decoding.ngram-weight 0"
    del ranking[1]
    tune.main(argv(workspace, "--beam", 2))
    assert capsys.readouterr().out.splitlines()[-1] == "best: --decoding.beam 2"


def test_the_last_line_does_not_name_the_checkpoints_own_language_model(workspace, ranking, tmp_path, capsys):
    ranking += [0]
    shutil.copy(workspace / "untrained-20.safetensors", tmp_path / "own.safetensors")
    shutil.copy(workspace / "lm.safetensors", tmp_path / "own.lm.safetensors")
    tune.main([*argv(workspace, "--ngram-weight", 0.5), "--checkpoint", str(tmp_path / "own.safetensors")])
    assert capsys.readouterr().out.splitlines()[-1] == "best: --decoding.ngram-weight 0.5"


def test_without_a_tuned_weight_the_language_model_has_the_default(workspace, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "las_fast.search.grid.decode_grid", lambda loaded, data, settings, *_: seen.extend(settings) or [["A"] * 3]
    )
    tune.main(argv(workspace, "--beam", 2, "--lm", workspace / "lm.safetensors"))
    assert [point.ngram_weight for point in seen] == [ngram.DEFAULT_WEIGHT]


def test_only_a_table_of_an_earlier_run_is_replaced(workspace, ranking, tmp_path):
    ranking += [0]
    out = tmp_path / "grid.txt"
    for _ in range(2):
        tune.main(argv(workspace, "--beam", 2, "--out", out))
    out.write_text("my notes\n")
    with pytest.raises(InputError, match="grid.txt exists and is not a table of settings in CSV"):
        tune.main(argv(workspace, "--beam", 2, "--out", out))
    with pytest.raises(InputError, match=r"the output is a table of settings in CSV; .* ends in .csv"):
        tune.main(argv(workspace, "--beam", 2, "--out", tmp_path / "grid.json"))


@pytest.mark.parametrize("name", ["--data", "--checkpoint", "--lm"])
def test_input_files_are_not_replaced_by_the_table(workspace, tmp_path, name):
    file = tmp_path / "x"
    file.write_text("beam,cer,wer,ld\n")
    more = ["--beam", 2, name, file, "--out", file]
    with pytest.raises(InputError, match="--out .*x is an input of this command"):
        tune.main(argv(workspace, *more))


def test_without_stdout_the_table_needs_a_file(workspace, ranking, monkeypatch, tmp_path):
    ranking += [0]
    monkeypatch.setattr("sys.__stdout__", None)
    with pytest.raises(InputError, match="the results cannot be printed; give --out FILE.csv"):
        tune.main(argv(workspace, "--beam", 2))
    tune.main(argv(workspace, "--beam", 2, "--out", tmp_path / "grid.csv"))


def test_every_setting_of_the_grid_is_checked_before_decoding(workspace, monkeypatch):
    monkeypatch.setattr(tune, "open_split", lambda *_, **__: pytest.fail("the settings were not checked"))
    with pytest.raises(InputError, match="decoding.ctc_weight must be"):
        tune.main(argv(workspace, "--ctc-weight", 0.5, 1.5))


def test_the_largest_weight_decides_whether_a_language_model_is_needed(workspace):
    for weights in ((0, 0.5), (0.5, 0)):
        with pytest.raises(InputError, match="decoding.ngram_weight is 0.5 and there is no language model"):
            tune.main(argv(workspace, "--ngram-weight", *weights))


def test_every_utterance_needs_a_transcript(workspace, tmp_path):
    manifest = make_manifest(tmp_path / "data", utterances=2)
    lines = manifest.read_text().splitlines()
    manifest.write_text("\n".join([*lines[:-1], lines[-1].rpartition("\t")[0] + "\t"]) + "\n")
    with pytest.raises(InputError, match="transcript"):
        tune.main([*argv(workspace, "--beam", 1), "--data", str(tmp_path / "data")])


def test_a_checkpoint_is_not_tuned_on_incompatible_data(workspace, tmp_path):
    archive = make_archive(tmp_path, "F23")
    with pytest.raises(InputError, match="has 28 values per frame"):
        tune.main([*argv(workspace, "--beam", 1), "--data", str(archive)])


def test_the_whole_split_is_loaded_with_the_checkpoints_settings(tmp_path):
    make_manifest(tmp_path / "data", utterances=3)
    manifest = tmp_path / "data" / "manifest.tsv"
    manifest.write_text(manifest.read_text().replace("\tA", "\tá-a "), encoding="utf-8")
    sections = {"data": DataConfig(max_seconds=0.1, normalise_text=True)}
    path = make_checkpoint(tmp_path, 20, mel_bins=23, sections=sections)
    dataset = open_split(tmp_path / "data", "train+dev", load_model(path), on_bad=None, normalise_text=False)
    assert len(dataset) == 6 and all(text.startswith("A A ") for text in dataset.texts)


def test_transcripts_are_mapped_to_the_vocabulary_on_request(tmp_path, workspace, capsys):
    make_manifest(tmp_path / "data", utterances=2)
    manifest = tmp_path / "data" / "manifest.tsv"
    manifest.write_text(manifest.read_text().replace("\tA", "\tá-a "), encoding="utf-8")
    command = [*argv(workspace, "--beam", 1), "--data", str(tmp_path / "data")]
    with pytest.raises(
        InputError, match="'-' 'a' 'á'; map them with --normalise-text; or leave .* with --on-bad skip$"
    ):
        tune.main(command)
    tune.main([*command, "--normalise-text"])
    assert "2 utterances of dev" in capsys.readouterr().out


def test_bad_utterances_are_left_out_on_request(tmp_path, workspace, capsys):
    make_manifest(tmp_path / "data", utterances=2)
    (tmp_path / "data" / "audio" / "dev-1.wav").write_bytes(b"no audio")
    command = [*argv(workspace, "--beam", 1), "--data", str(tmp_path / "data")]
    with pytest.raises(InputError, match="dev-1.wav .*; or leave such utterances out with --on-bad skip$"):
        tune.main(command)
    tune.main([*command, "--on-bad", "skip"])
    assert "1 utterances of dev" in capsys.readouterr().out


def test_the_cache_of_the_training_is_not_used(tmp_path):
    make_manifest(tmp_path / "data", utterances=1)
    sections = {"data": DataConfig(cache=str(tmp_path / "cache"))}
    path = make_checkpoint(tmp_path, 20, mel_bins=23, sections=sections)
    open_split(tmp_path / "data", "dev", load_model(path), on_bad=None, normalise_text=False)
    assert not (tmp_path / "cache").exists()


def test_a_batch_that_does_not_fit_is_halved(workspace, monkeypatch, tmp_path):
    command = argv(workspace, "--beam", 1, 2, "--out", tmp_path / "table.csv")
    tune.main(command)
    expected, sizes = (tmp_path / "table.csv").read_text(), []

    def search(model, memory, *args, **options):
        sizes.append(len(memory.lengths))
        if len(memory.lengths) > 1:
            raise MemoryError
        return beam_search(model, memory, *args, **options)

    monkeypatch.setattr("las_fast.search.grid.beam_search", search)
    tune.main(command)
    assert (tmp_path / "table.csv").read_text() == expected and sizes[0] == 3 and sizes.count(1) == 6


def test_a_model_that_diverged_is_refused(workspace, monkeypatch, tmp_path):
    def diverged(name, device):
        loaded = load_model(name, device)
        torch.nn.init.constant_(loaded.model.speller.bias, float("nan"))
        return loaded

    monkeypatch.setattr("las_fast.checkpoint.load_model", diverged)
    with pytest.raises(NotFinite, match="no hypothesis for dev-. has a finite score"):
        tune.main(argv(workspace, "--beam", 2, "--out", tmp_path / "table.csv"))
    assert not (tmp_path / "table.csv").exists()


def test_progress_counts_each_utterance_once_for_each_setting(workspace, monkeypatch):
    counted, totals = [], []

    @contextmanager
    def progress(total, *_):
        totals.append(total)
        yield Namespace(update=counted.append)

    monkeypatch.setattr("las_fast.search.grid.ProgressBar", progress)
    tune.main(argv(workspace, "--beam", 1, 2))
    assert totals == [6] and sum(counted) == 6


def test_a_grid_gives_the_scores_of_separate_decodings(workspace, tmp_path, capsys):
    """Each of two settings has the scores that it has when decoded alone."""
    alone = {}
    for penalty in ("0", "2"):
        tune.main(argv(workspace, "--beam", 4, "--length-penalty", penalty, "--out", tmp_path / "one.csv"))
        alone[penalty] = list(csv.reader((tmp_path / "one.csv").open()))[1]
    tune.main(argv(workspace, "--beam", 4, "--length-penalty", 0, 2, "--out", tmp_path / "two.csv"))
    both = {row[1]: row for row in list(csv.reader((tmp_path / "two.csv").open()))[1:]}
    assert both == alone


@pytest.mark.parametrize(("rewards", "models"), [((0.0, 0.5), 2), (tuple(0.1 * i for i in range(17)), 1)])
def test_each_setting_has_one_language_model_for_all_batches(workspace, monkeypatch, rewards, models):
    """CUDA graphs are kept per language model. With more settings than graphs, each search folds its own."""
    seen = []

    def search(*args, ngram, capture, **options):
        seen.append(ngram)
        assert capture is None  # on a CPU
        return beam_search(*args, ngram=ngram, capture=capture, **options)

    monkeypatch.setattr("las_fast.search.grid.beam_search", search)
    monkeypatch.setattr("las_fast.search.dataset.MAX_UTTERANCES_PER_BATCH", 1)
    tune.main(argv(workspace, "--beam", 2, "--lm", workspace / "lm.safetensors", "--length-reward", *rewards))
    assert len(seen) == 3 * len(rewards) and len(set(map(id, seen))) == models
