"""The benchmark tools: baselines equal las_fast, timing is interleaved, reports show the recorded rows."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from tiny_checkpoints import MODEL, make_checkpoint
from tiny_corpora import make_archive, make_manifest, make_speech
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import (
    attention,
    beam_threshold,
    cost,
    interleaved,
    interview,
    language_models,
    learning_curve,
    machine,
    picture_index,
    recognition,
    report,
    scores,
    silence,
    test_bench_growth,
    views,
)
from benchmarks.flops import listener_flops, speller_flops
from benchmarks.plain import Plain, PlainGraphed, PlainPacked, Usual
from benchmarks.rows import RESULTS, append_rows, context, machine_name, read_rows
from benchmarks.splits import parts, utterances_of
from benchmarks.subprocess_timer import SubprocessTimer
from benchmarks.synthetic_speech import LETTERS_PER_FRAME, write_recordings
from benchmarks.test_bench_shares import COLUMNS
from las_fast import decode, lm
from las_fast.checkpoint import load_model
from las_fast.config import DataConfig, DecodingConfig, ListenerConfig, ModelConfig, SpellerConfig, load_config, to_yaml
from las_fast.data.audio import load_audio
from las_fast.data.corpus import Utterance
from las_fast.data.layouts import open_corpus
from las_fast.data.texts import read_texts
from las_fast.errors import InputError
from las_fast.model.las import LAS
from las_fast.ops import Steps
from las_fast.search.beam import beam_search
from las_fast.search.kneser_ney import encode_sentences, perplexity
from las_fast.search.ngram import load_lm
from las_fast.text import EOS, PAD
from las_fast.training.losses import training_loss
from las_fast.training.monitor import THRESHOLDS

V = 9
LENGTHS = torch.tensor([30, 21, 3])
SUITES = sorted(path.stem for path in Path(report.__file__).parent.glob("test_bench_*.py"))


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_can_be_imported(name):
    assert any(member.startswith("test_") for member in vars(importlib.import_module(f"benchmarks.{name}")))


@pytest.fixture
def model():
    torch.manual_seed(0)
    listener = ListenerConfig(conv_channels=(6,), conv_kernels=(3,), conv_strides=(2,), lstm_size=5, pyramids=1)
    speller = SpellerConfig(key_size=8, value_size=7, embedding_size=6, lstm_sizes=(10, 8))
    return LAS(ModelConfig(listener, speller, ctc_layer=1), input_size=4, vocabulary_size=V).eval()


@pytest.fixture
def features():
    x = torch.randn(3, 30, 4, generator=torch.Generator().manual_seed(1))
    return x.masked_fill((torch.arange(30) >= LENGTHS[:, None])[..., None], 0.0)


class PlainUncaptured(PlainGraphed):
    """The loop of PlainGraphed, without graphs."""

    def __init__(self, model):
        super().__init__(model, capture=False)


@pytest.mark.parametrize("kind", [Usual, Plain, PlainPacked, PlainUncaptured])
def test_a_baseline_has_the_logits_losses_and_gradients_of_the_model(model, features, kind):
    tokens = torch.tensor([[3, 4, 5, 6, EOS], [7, 8, EOS, PAD, PAD], [EOS, PAD, PAD, PAD, PAD]])
    settings = {"label_smoothing": 0.1, "ctc_weight": 0.5, "guided_weight": 1.0, "guided_width": 0.15}
    actual = []
    for one in (model, kind(model).eval()):
        output = one(features, LENGTHS, tokens)
        loss, _ = training_loss(output, tokens, torch.tensor([5, 3, 1]), **settings)
        loss.backward()
        embedding = one.embedding if kind is type(one) else one.speller.embedding
        norm = torch.nn.utils.clip_grad_norm_([p for p in one.parameters() if p.requires_grad], 1e9)
        actual.append((*output, loss.detach(), embedding.weight.grad, norm))
    for ours, theirs in zip(*actual, strict=True):
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)


def test_the_loop_that_is_captured_computes_in_the_precision_of_autocast(model, features):
    tokens, outputs = torch.tensor([[3, 4, EOS], [7, 8, EOS], [5, EOS, PAD]]), []
    for kind in (Plain, PlainUncaptured):
        with torch.autocast("cpu", torch.bfloat16):
            output = kind(model).eval()(features, LENGTHS, tokens)
        outputs.append(output)
    plain, captured = outputs
    assert not torch.equal(captured.logits, PlainUncaptured(model).eval()(features, LENGTHS, tokens).logits)
    torch.testing.assert_close(captured.logits, plain.logits, atol=3e-2, rtol=3e-2)
    torch.testing.assert_close(captured.weights, plain.weights, atol=1e-2, rtol=1e-2, check_dtype=False)


@pytest.mark.parametrize("kind", [Usual, Plain])
@pytest.mark.parametrize("beam", [1, 4])
def test_a_baseline_finds_the_same_hypotheses_as_the_search(model, features, kind, beam):
    steps = 6
    baseline = kind(model).eval()
    config = DecodingConfig(beam=beam, minimum_share=1.0, maximum_share=0.0, maximum_extra=steps - 1)
    with torch.inference_mode():
        listened, lengths, _ = model.listener(features, LENGTHS)
        expected = beam_search(model, model.listen(features, LENGTHS), config, nbest=beam, backend="reference")
    tokens, scores = baseline.search(listened, lengths, beam, steps)
    assert tokens[..., -1].eq(EOS).all()
    assert tokens[..., :-1].tolist() == [[h.text_tokens for h in utterance] for utterance in expected]
    torch.testing.assert_close(scores, torch.tensor([[h.score for h in utterance] for utterance in expected]))


def test_dropout_masks_of_a_baseline_are_locked_and_scaled(model):
    baseline = Plain(model).train()
    x = baseline.locked_dropout(torch.ones(2, 50, 3))
    assert (x == x[:, :1]).all()
    assert all(value in (0.0, pytest.approx(1 / (1 - baseline.listener_dropout))) for value in x.unique().tolist())


def check_memory_settings():
    """A function that fails in a process without the memory settings of las_fast."""

    def function():
        assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"

    return function


def test_a_function_can_be_timed_in_a_subprocess():
    timer = SubprocessTimer(check_memory_settings, tuned=True)
    timings = interleaved.time_interleaved({"subprocess": timer, "here": lambda: None}, baseline="here", rounds=2)
    timer.close()
    assert timings["subprocess"].rounds == 2 and timings["subprocess"].median > 0
    assert timer.process.exitcode == 0


def test_functions_alternate_and_ratios_are_speeds_relative_to_the_baseline():
    calls = []

    def busy_loop(name, seconds):
        def run():
            calls.append(name)
            end = time.process_time() + seconds
            while time.process_time() < end:
                pass

        return run

    functions = {"slow": busy_loop("slow", 0.03), "fast": busy_loop("fast", 0.01)}
    timings = interleaved.time_interleaved(functions, baseline="slow", rounds=3)
    assert calls == ["slow", "fast", *["slow", "fast"], *["fast", "slow"], *["slow", "fast"]]
    assert timings["slow"].ratio == timings["slow"].cpu_ratio == 1.0
    assert timings["fast"].cpu_ratio == pytest.approx(3.0, rel=0.2)
    assert timings["fast"].rounds == 3 and timings["fast"].load >= 0.0


def row(path, median, *, what="beam search", shape="B16 K8 T200 V31 H512 D256 64 steps", commit="abc"):
    timing = {path: interleaved.Timing(3, median, median / 10, median, 2.0, 2.0, 0.5)}
    labels = {"what": what, "shape": shape, "dtypes": {path: "float32"}, "baseline": "plain", "unit": "us"}
    rows = interleaved.timing_rows(timing, **labels)
    return [(x[0], commit, *x[2:]) for x in rows]


def test_a_report_has_the_last_row_of_each_path_as_bars_and_curves(tmp_path, capsys):
    rows = row("plain", 9.0, commit="old") + row("plain", 2.0) + row("las_fast cpp", 1.0)
    for B in (1, 2, 4):
        rows += row("plain", B, what="beam search by batch", shape=f"B{B} K8 T200 V31 H512 D256 32 steps")
    append_rows(tmp_path / "decode.csv", interleaved.COLUMNS, rows[:2])
    append_rows(tmp_path / "decode.csv", interleaved.COLUMNS, rows[2:])
    here = (*context()[:4], 1)
    limits = [(*here, "matrix products", "float32", "9", 100.0, "GFLOP/s"),
              (*here, "memory bandwidth", "float32", "9", 30.0, "GB/s")]  # fmt: skip
    append_rows(tmp_path / "machine.csv", machine.COLUMNS, limits)
    threads = torch.get_num_threads()
    report.main(["--results", str(tmp_path), "--plots", str(tmp_path / "plots")])
    out = capsys.readouterr().out
    assert "| plain | float32 | 2 us" in out and "9 us" not in out and "by batch" not in out.split("/")[0]
    pictures = sorted((tmp_path / "plots").glob("*.png"))
    assert [p.name for p in pictures] == [
        f"beam-search-b16-k8-t200-v31-h512-d256-64-steps-{threads}.png", "beam-search-by-batch.png",
    ]  # fmt: skip
    assert all(p.stat().st_size > 5000 for p in pictures)
    assert "beam-search-by-batch.png" in (tmp_path / "README.md").read_text()


def test_the_page_about_pictures_says_what_the_rows_say_and_lists_every_picture():
    page = (RESULTS / "README.md").read_text(encoding="utf-8")
    (name,) = re.findall(r"^## Measurements on (.*)$", page, re.M)
    assert page == picture_index.index([p.entry for p in report.recorded_pictures(RESULTS, name)], name)
    assert sorted(re.findall(r"\]\(plots/(\S+)\)", page)) == sorted(p.name for p in (RESULTS / "plots").iterdir())


def test_bars_are_told_from_the_fastest_to_the_slowest():
    common = {"what": "beam search", "baseline": "plain", "threads": "1", "unit": "us", "dtype": "float32"}
    rows = [common | {"path": path, "cpu": "2000", "median": "1", "cpu_ratio": ratio} for path, ratio in
            (("plain", "1"), ("usual", "0.5"), ("new", "3.14159"), ("same", "0.99"), ("faster", "12"))]  # fmt: skip
    assert report.bars_in_words(rows) == (
        "Baseline: plain, 2000 us. Faster: faster (12 times); new (3.14 times). As fast: same. Slower: usual (2 times)."
    )
    stages = [row | {"what": "decoding by stages"} for row in rows[:2]]
    assert report.bars_in_words(stages) == "Of plain: usual 200%."


def test_curves_and_growth_are_told_by_their_ends():
    common = {"what": "beam search by beam", "baseline": "plain", "threads": "1", "unit": "us"}
    rows = [common | {"path": path, "shape": f"B16 K{K}", "cpu_ratio": ratio} for K, path, ratio in
            ((1, "plain", "1"), (1, "x", "2"), (4, "plain", "1"), (4, "x", "1.5"))]  # fmt: skip
    assert report.curves_in_words(rows, "beam") == "Faster than plain with a beam of 1 to 4: x (1.5 to 2 times)."
    sizes = [{"over": "utterances", "size": n, "seconds": s, "peak_mib": "300"} for n, s in (("1", "2"), ("9", "8.5"))]
    assert report.growth_in_words(sizes) == "2 s, 300 MiB for 1 and 8.5 s, 300 MiB for 9 utterances."


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (10.37, "10.4 times faster than plain"),
        (0.23, "4.35 times slower than plain"),
        (251.4, "251 times faster than plain"),
        (1.03, "as fast as plain"),
        (0.98, "as fast as plain"),
        (1.04, "1.04 times faster than plain"),
    ],
)
def test_bars_say_in_words_how_fast_a_path_is(ratio, words):
    measured = {"path": "x", "baseline": "plain", "what": "beam search", "ratio": str(ratio)}
    assert report.compare_in_words(measured, "ratio") == words
    assert report.compare_in_words(measured | {"path": "plain"}, "ratio") == ""
    stage = measured | {"what": "decoding by stages", "ratio": "4"}
    assert report.compare_in_words(stage, "ratio") == "25% of plain"


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ("B16 K8 T200 V31 64 steps", "batch 16, beam 8, 200 frames, vocabulary 31, 64 steps"),
        ("B9 T630 F80 U74", "batch 9, 630 frames, 80 features, 74 tokens"),
        ("24 recordings of 108 s in all", "24 recordings of 108 s in all"),
    ],
)
def test_titles_spell_shapes_out(shape, words):
    assert report.shape_in_words(shape) == words


@pytest.mark.parametrize(
    ("low", "high", "words"), [(0, 0.04, "less than 0.1"), (0.1, 0.44, "0.1 to 0.4"), (0.31, 0.32, "0.3")]
)
def test_loads_that_round_to_one_value_are_one_value(low, high, words):
    assert report.load_in_words(low, high) == words


def test_a_report_draws_the_growth_of_decoding(tmp_path):
    append_rows(tmp_path / "train.csv", interleaved.COLUMNS, row("plain", 2.0))
    sizes = [(over, n, 10 * n, n / 10, 500.0, 0.0) for over in ("utterances", "seconds") for n in (9, 1, 2, 4)]
    here = (*context()[:4], 1)
    rows = [(*here, *size) for size in (*sizes, ("utterances", 9, 90, 0.9, 400.0, 0.0))]
    rows.append((*context()[:4], 2, *sizes[0]))
    append_rows(tmp_path / "growth.csv", test_bench_growth.COLUMNS, rows)
    report.main(["--results", str(tmp_path), "--plots", str(tmp_path / "plots")])
    assert (tmp_path / "plots" / "growth.png").stat().st_size > 5000
    latest = report.latest_growth(read_rows(tmp_path / "growth.csv"), machine_name())
    assert [row["size"] for row in latest] == ["1", "1", "2", "2", "4", "4", "9", "9"]
    assert [row["peak_mib"] for row in latest[-2:]] == ["400.0", "500.0"]


def test_a_report_shows_the_last_share_of_each_part_of_the_model(tmp_path, capsys):
    append_rows(tmp_path / "train.csv", interleaved.COLUMNS, row("plain", 2.0))
    measured = (2, 50, 25, 100, 0.25), (1, 50, 50, 100, 0.5)
    parts = [("encoder", "training", "float32", "B1", *numbers) for numbers in measured]
    append_rows(tmp_path / "shares.csv", COLUMNS, [(*context(), *part) for part in parts])
    report.main(["--results", str(tmp_path), "--plots", str(tmp_path / "plots")])
    lines = [line for line in capsys.readouterr().out.splitlines() if "encoder" in line]
    assert lines == ["| encoder | training | float32 | 50 | 1 | 50 | 100 | 50% |"]


def test_flops_equal_the_count_of_torch():
    """torch does not count LSTM layers; their operations are added by formula."""
    listener = ListenerConfig((6, 8), (3, 5), (2, 1), lstm_size=5, pyramids=1, top_layers=1)
    speller, T, U = SpellerConfig(8, 7, 6, (10, 9)), 24, 4
    model = LAS(ModelConfig(listener, speller), input_size=4, vocabulary_size=V).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        memory = model.listen(torch.randn(1, T, 4), torch.tensor([T]))
    layers = zip(model.listener.layers, (T // 2, T // 4, T // 4), strict=True)
    lstms = sum(2 * 2 * 4 * 5 * (layer.lstm.input_size + 5) * frames for layer, frames in layers)
    assert listener_flops(listener, speller, 4, T) == counter.get_total_flops() + lstms
    state = model.start(memory, 1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for _ in range(U):
            _, _, state = model.step(torch.full((1, 1), EOS), state, memory, backend="reference")
    step = speller_flops(speller, V, T / 4, embedding_table=False)
    assert U * step == counter.get_total_flops()
    assert step - speller_flops(speller, V, T / 4, embedding_table=True) == 2 * 4 * 10 * 6


def validation(epoch, cer, formed):
    row = {"kind": "valid", "step": epoch, "epoch": epoch, "cer": cer, "ld": cer / 10, "core_hours": 0.5, "loss": 1.0}
    return row | {"monitor": dict.fromkeys(THRESHOLDS, 0.9 if formed else 0.3)}


@pytest.mark.parametrize(
    ("formed", "expected"),
    [
        ([False, True, False, True, True], ("4", "40.00", "20.00")),  # formed at epoch 2, but not at 3
        ([True] * 5, ("1", "", "90.00")),
        ([True] * 4 + [False], ("", "30.00", "")),
    ],
)
def test_attention_counts_as_formed_from_the_validation_after_which_it_stays_so(tmp_path, formed, expected):
    (tmp_path / "config.yaml").write_text(to_yaml(load_config("tiny")))
    scores = zip(range(1, 6), [90.0, 60.0, 40.0, 20.0, 30.0], formed, strict=True)
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(validation(*x)) + "\n" for x in scores))
    row = dict(zip(recognition.COLUMNS, recognition.summary_row(tmp_path, what="a", data="b"), strict=True))
    assert (row["formed"], row["cer_before_formed"], row["cer_when_formed"]) == expected
    assert (row["cer_best"], row["cer_last"], row["epochs"], row["core_hours"]) == ("20.00", "30.00", "5", "0.50")


def test_recorded_trainings_are_a_table_and_a_picture(tmp_path, monkeypatch, capsys):
    for name in ("FILE", "VALIDATIONS", "PICTURE"):
        monkeypatch.setattr(recognition, name, tmp_path / name.lower())
    (tmp_path / "config.yaml").write_text(to_yaml(load_config("tiny")))
    rows = [validation(1, 90.0, False), validation(2, 50.0, True), validation(3, 40.0, True)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recognition.main([str(tmp_path), "--data", "made", "--what", "as it is", "--record", "--table"])
    out = capsys.readouterr().out
    assert "| not formed | 1 | 1.00, 1.00, 1.00 | 90% |" in out and "| formed | 2 | 1.00, 1.00, 1.00 | 45% |" in out
    assert (tmp_path / "picture").read_bytes()[:4] == b"\x89PNG"
    recognition.main([str(tmp_path), "--data", "made", "--what", "as it is", "--record"])
    assert "nothing appended: file has a row of this run and --what" in capsys.readouterr().out
    recognition.main([str(tmp_path), "--data", "made", "--what", "again", "--record"])
    assert [row["what"] for row in read_rows(tmp_path / "file")] == ["as it is", "again"]
    assert [row["epoch"] for row in read_rows(tmp_path / "validations")] == ["1", "2", "3"] * 2


def test_trainings_without_a_named_corpus_have_a_picture_of_their_own(tmp_path, monkeypatch):
    for name in ("FILE", "VALIDATIONS", "PICTURE"):
        monkeypatch.setattr(recognition, name, tmp_path / name.lower())
    (tmp_path / "config.yaml").write_text(to_yaml(load_config("tiny")))
    (tmp_path / "log.jsonl").write_text(json.dumps(validation(1, 90.0, True)) + "\n")
    recognition.main([str(tmp_path), "--record", "--table"])
    assert (tmp_path / "picture").read_bytes()[:4] == b"\x89PNG"
    assert [recognition.corpus_of({"data": data}) for data in ("an4, half", "an4x 1", "")] == [
        "an4", "an4x", "unnamed data"
    ]  # fmt: skip


@pytest.mark.parametrize("change", [{"cer": None}, {"monitor": {}}, {"monitor": {**dict.fromkeys(THRESHOLDS, 0.9),
                                                                                "audio_gain": None}}])  # fmt: skip
def test_a_validation_without_all_its_numbers_is_an_error(tmp_path, change):
    (tmp_path / "log.jsonl").write_text(json.dumps(validation(1, 90.0, True) | change) + "\n")
    with pytest.raises(InputError, match="the validation at step 1 of .* lacks scores or values of the monitor"):
        recognition.main([str(tmp_path)])


def test_silence_surrounds_the_part_of_a_recording_that_an_utterance_is(tmp_path):
    loaded = load_model(make_checkpoint(tmp_path, 20, mel_bins=23))
    soundfile.write(tmp_path / "long.wav", make_speech(3.0), 16000)
    part = Utterance("a", tmp_path / "long.wav", "A", seconds=0.5, start=1.0, is_part=True)
    ((frames, seconds),) = silence.padded_frames(loaded, [part], 0.25, None)
    assert seconds == pytest.approx(1.0) and len(frames) <= 100
    samples = silence.pad(np.ones(4, np.float32), 4, 0.5, -20.0, seed=0)
    assert samples[2:6].tolist() == [1.0] * 4 and 0 < np.abs(samples[:2]).max() < 1 and len(samples) == 8


def test_silence_is_measured_for_every_source_and_decoding(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(silence, "FILE", tmp_path / "silence.csv")
    monkeypatch.setattr(silence, "PADDING", ((0, None), (0.1, -54)))
    manifest, path = make_manifest(tmp_path / "data", utterances=3), make_checkpoint(tmp_path, 20, mel_bins=23)
    silence.main(["--checkpoint", str(path), "--data", str(manifest), "--every", "2", "--record"])
    rows = read_rows(tmp_path / "silence.csv")
    assert [(row["way"], row["part"], row["utterances"]) for row in rows[:4]] == [
        ("greedy", "all", "2"), ("greedy", "data", "2"), ("own settings", "all", "2"), ("own settings", "data", "2")
    ]  # fmt: skip
    assert [row["seconds"] for row in rows] == ["0"] * 4 + ["0.1"] * 4 and rows[4]["db"] == "-54"


@pytest.mark.parametrize(
    ("every", "text", "sentence"),
    [
        (0, "A", "--every must be at least 1; got 0"),
        (1, " ", "--split dev needs recordings with transcripts; it has 2 recordings without a transcript, the first"),
    ],
)
def test_a_split_without_usable_utterances_is_an_error(tmp_path, every, text, sentence):
    manifest = make_manifest(tmp_path, suffix=".jsonl", utterances=2)
    rows = [json.loads(line) | {"transcript": text} for line in manifest.read_text().splitlines()]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=sentence):
        utterances_of(str(manifest), "dev", every)
    archive = make_archive(tmp_path / "archive", "F23", utterances=1)
    with pytest.raises(InputError, match="has HW4P2 F23 frames; give a corpus of recordings"):
        utterances_of(str(archive), "dev-clean")


def test_an_interview_without_utterances_of_its_source_is_an_error(tmp_path):
    manifest = make_manifest(tmp_path, utterances=1)
    with pytest.raises(InputError, match="no path of --split dev contains 'librispeech'; give another --source"):
        interview.main(["--data", str(manifest)])


def test_a_report_without_rows_says_what_to_run(tmp_path, capsys):
    report.main(["--results", str(tmp_path)])
    assert "pytest benchmarks --record" in capsys.readouterr().out


def test_the_lower_bound_of_a_step_is_set_by_its_matmuls_or_its_keys():
    step = {"what": "beam search", "shape": "B1 K1 T1 V31 H512 D256 32 steps", "threads": "1"}
    limits = {("matrix products", "float32"): 100.0, ("memory bandwidth", "float32"): 1e9}
    operations = 2 * (22 * 512 * 512 + 256 * 512 + 512 * 31 + 768)
    assert report.lower_bound(step, "float32", limits) == pytest.approx(operations / 100e9 * 1e6)
    limits = {("matrix products", "float32"): 1e9, ("memory bandwidth", "float32"): 10.0}
    assert report.lower_bound(step, "float32", limits) == pytest.approx(768 * 4 / 10e9 * 1e6)


def test_the_machines_throughputs_are_measured(monkeypatch):
    monkeypatch.setattr(machine, "SECONDS", 0.05)
    assert machine.matmul_flops(torch.float32, 64) > 1e8
    assert machine.bandwidth(2**16) > 1e7
    assert 0 < machine.call_overhead() < 1e-2


def test_the_cost_of_a_training_follows_from_its_hours_and_prices(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cost, "FILE", tmp_path / "cost.csv")
    (tmp_path / "small.yaml").write_text(
        "features: {kind: mfcc, size: 8, mel_bins: 8}\ndata: {frames_per_batch: 2000}\ntraining: {epochs: 10}\nmodel:\n"
        "  listener: {conv_channels: [6], conv_strides: [2], lstm_size: 5, pyramids: 1, top_layers: 1}\n"
        "  speller: {key_size: 8, value_size: 7, embedding_size: 6, lstm_sizes: [10, 8]}\n"
    )
    threads = torch.get_num_threads()
    cost.main(["--config", str(tmp_path / "small.yaml"), "--hours", "50", "--rounds", "1", "--record"])
    torch.set_num_threads(threads)
    (row,) = read_rows(tmp_path / "cost.csv")
    assert float(row["core_hours"]) == pytest.approx(500 / float(row["times_real_time"]), rel=1e-2)
    assert float(row["cpu_cost"]) == pytest.approx(0.04 * float(row["core_hours"]), rel=1e-2)
    assert 0 < float(row["gpu_products_hours"]) < float(row["gpu_hours"])
    config, frames = load_config(tmp_path / "small.yaml"), torch.tensor([400, 1000])
    tokens = 1000 * LETTERS_PER_FRAME + 1
    assert cost.dependent_steps(config, frames) == pytest.approx(2 * (500 + 250 + 250 + 3 * tokens))
    one = cost.step_flops(config, frames[:1])
    assert cost.step_flops(config, frames) > 2 * one


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
def test_synthetic_recordings_can_be_read(tmp_path, suffix):
    paths = write_recordings(tmp_path, suffix, [300, 450])
    assert all(len(load_audio(path, 16000, strict=True)) > 16000 for path in paths)


def test_attention_of_several_epochs_is_one_picture(tmp_path):
    (tmp_path / "run" / "attention").mkdir(parents=True)
    for epoch in (1, 12):
        arrays = {"ids": np.array(["a"]), "weights_0": np.full((3, 5), 0.2, np.float32), "text_0": np.array("AB")}
        np.savez(tmp_path / "run" / "attention" / f"epoch-{epoch:07.2f}.npz", **arrays)
    out = tmp_path / "out.png"
    attention.main([f"{tmp_path}/run@1", f"{tmp_path}/run@12", "--out", str(out)])
    assert out.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(InputError, match="run@3: expected RUN@EPOCH .* available epochs: 1, 12"):
        attention.main([f"{tmp_path}/run@3", "--out", str(out)])
    with pytest.raises(InputError, match="--utterance 1: .*run@1 has the attention of 1 utterances, from 0 on"):
        attention.main([f"{tmp_path}/run@1", "--utterance", "1", "--out", str(out)])


def test_a_checkpoint_is_drawn_beside_its_training(tmp_path):
    root = make_archive(tmp_path, "F23")
    found = open_corpus(root).utterances("dev-clean")[1]
    like = attention.Panel("epoch 1", found.id, "AB", np.full((3, 5), 0.2, np.float32), 0.02)
    checkpoint = str(make_checkpoint(tmp_path, 28))
    panel = attention.spell_panel(checkpoint, like, str(root))
    frames = np.load(found.path)
    assert panel.weights.shape == (3, -(-len(frames) // 2)) and panel.column_seconds == pytest.approx(0.02)
    assert np.allclose(panel.weights.sum(1), 1, atol=1e-5)
    attention.draw(tmp_path / "x.png", [like, panel])
    assert (tmp_path / "x.png").stat().st_size > 3000
    with pytest.raises(InputError, match=f"{checkpoint} is a checkpoint, .* give --data ROOT"):
        (tmp_path / "run" / "attention").mkdir(parents=True)
        arrays = {"ids": np.array([found.id]), "weights_0": like.weights, "text_0": np.array("AB")}
        np.savez(tmp_path / "run" / "attention" / "epoch-0001.00.npz", **arrays)
        attention.main([f"{tmp_path}/run@1", checkpoint, "--out", str(tmp_path / "y.png")])


def test_scores_cover_every_part_and_setting_and_do_not_depend_on_the_batch(tmp_path, monkeypatch, capsys):
    manifest = make_manifest(tmp_path / "data", utterances=5)
    lines = manifest.read_text().splitlines()
    manifest.write_text("\n".join(line.replace("made", f"part-{i % 2}") for i, line in enumerate(lines)) + "\n")
    lm.main([str(tmp_path / "data"), "--out", str(tmp_path / "untrained-20.lm.safetensors"), "--order", "2"])
    decoding = DecodingConfig(ctc_weight=0.3, ngram_weight=0.1, length_reward=0.2)
    path = make_checkpoint(
        tmp_path, 20, mel_bins=23, sections={"model": replace(MODEL, ctc_layer=0), "decoding": decoding}
    )
    monkeypatch.setattr(scores, "FILE", tmp_path / "scores.csv")
    data = ["--checkpoint", str(path), "--data", str(tmp_path / "data")]
    scores.main([*data, "--by", "source", "--beam", "3", "--record"])
    assert "when an utterance is decoded alone: 0" in capsys.readouterr().out
    rows = read_rows(tmp_path / "scores.csv")
    names = ["greedy", "beam", "beam, CTC", "beam, language model", "beam, CTC, language model"]
    assert list(dict.fromkeys(row["way"] for row in rows)) == names
    assert {row["part"] for row in rows} == {"all", "part-0", "part-1"} and len(rows) == 15
    for way in names:
        whole, *some = (int(row["utterances"]) * float(row["ld"]) for row in rows if row["way"] == way)
        assert sum(some) == pytest.approx(whole, abs=0.01)
    whole = {row["way"]: row["cer"] for row in rows if row["part"] == "all"}
    decode.main([*data, "--split", "dev", "--out", str(tmp_path / "out.csv"), "--device", "cpu", "--beam", "3"])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert float(whole["beam, CTC, language model"]) == pytest.approx(last["cer"], abs=1e-3)
    scores.main([*data, "--beam", "3", "--record", "--backend", "reference", "--ways", "0", "2"])
    again = {row["way"]: row["cer"] for row in read_rows(tmp_path / "scores.csv")[15:]}
    assert again == {f"{name}, reference": whole[name] for name in ("greedy", "beam, CTC")}
    with pytest.raises(
        InputError, match=r"--ways takes indices from 0 to 4 \(0: greedy; 1: beam; 2: beam, CTC; .*\); got \[5\]"
    ):
        scores.main([*data, "--ways", "5"])
    with pytest.raises(InputError, match="decoding.beam must be at least 1; got 0"):
        scores.main([*data, "--beam", "0"])


def test_language_models_are_compared_by_bits_and_cer(tmp_path, monkeypatch, capsys):
    make_manifest(tmp_path / "data", utterances=4)
    for order in (1, 3):
        lm.main([str(tmp_path / "data"), "--out", str(tmp_path / f"m{order}.lm.safetensors"), "--order", str(order)])
    path = make_checkpoint(tmp_path, 20, mel_bins=23, sections={"model": MODEL, "decoding": DecodingConfig(beam=2)})
    monkeypatch.setattr(language_models, "FILE", tmp_path / "language_models.csv")
    data = ["--checkpoint", str(path), "--data", str(tmp_path / "data")]
    models = [str(tmp_path / f"m{order}.lm.safetensors") for order in (1, 3)]
    capsys.readouterr()
    language_models.main([*data, "--lm", *models, "--ngram-weight", "0", "0.4", "--by", "source", "--record"])
    rows = read_rows(tmp_path / "language_models.csv")
    assert [(row["lm"], row["ngram_weight"], row["part"]) for row in rows] == [
        (name, weight, part) for name in ("m1", "m3") for weight in ("0.0", "0.4") for part in ("all", "made")
    ]
    assert len(capsys.readouterr().out.splitlines()) == 8
    texts = list(read_texts(tmp_path / "data", "dev"))
    for name, row in (("m1", rows[0]), ("m3", rows[4])):
        model = load_lm(tmp_path / f"{name}.lm.safetensors")
        tokens = encode_sentences(texts, model.characters)
        assert float(row["bits"]) == pytest.approx(math.log2(perplexity(model.levels, tokens, 31)), abs=2e-3)
    assert rows[0]["cer"] == rows[4]["cer"], "a weight of 0 uses no model"
    difference = str(tmp_path / "difference.lm.safetensors")
    lm.main([str(tmp_path / "data"), "--subtract", str(tmp_path / "data"), "--order", "2", "--out", difference])
    language_models.main([*data, "--lm", difference, "--ngram-weight", "0.4", "--record"])
    row = read_rows(tmp_path / "language_models.csv")[-1]
    assert (row["lm"], row["bits"]) == ("difference", "") and " bits" not in capsys.readouterr().out
    decode.main([*data, "--split", "dev", "--out", str(tmp_path / "out.csv"), "--device", "cpu", "--beam", "2", "--lm",
                 models[1], "--decoding.ngram-weight", "0.4"])  # fmt: skip
    assert float(rows[6]["cer"]) == pytest.approx(json.loads(capsys.readouterr().out.splitlines()[-1])["cer"], abs=6e-3)
    with pytest.raises(InputError, match="--lm gone is not a file"):
        language_models.main([*data, "--lm", "gone", "--ngram-weight", "0.1"])


def test_rows_do_not_say_where_this_machine_keeps_its_files(tmp_path):
    append_rows(tmp_path / "x.csv", ("checkpoint", "cer"), [("/home/me/runs/mine", 1.5), ("runs/mine", None)])
    append_rows(tmp_path / "x.csv", ("checkpoint", "cer"), [("english", "10 dB / 5")])
    assert (tmp_path / "x.csv").read_text() == "checkpoint,cer\nruns/mine,1.5\nruns/mine,\nenglish,10 dB / 5\n"


def test_a_learning_curve_is_fitted_and_its_predictions_have_a_range(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(learning_curve, "FILE", tmp_path / "curve.csv")
    monkeypatch.setattr(learning_curve, "PICTURE", tmp_path / "curve.png")
    hours = np.array([1.0, 3.0, 6.0, 13.0])
    assert learning_curve.fit(hours, 80 * hours**-0.5) == pytest.approx((80, 0.5))
    assert learning_curve.predict(hours, 80 * hours**-0.5, 100.0) == pytest.approx((8, 8, 8))
    middle, low, high = learning_curve.predict(hours, 80 * hours**-0.5 * np.array([1, 1.1, 0.9, 1]), 100.0)
    assert low < middle < high
    make_manifest(tmp_path / "data", utterances=3)
    names = []
    data = ["--data", str(tmp_path / "data")]
    for i, (length, info) in enumerate([(0.0001, {}), (0.0002, {"speech_hours": 0.00015}), (0.0, {})]):
        sections = {"model": replace(MODEL, ctc_layer=0), "data": DataConfig(hours=length),
                    "decoding": DecodingConfig(beam=2, ctc_weight=0.5)}  # fmt: skip
        (tmp_path / str(i)).mkdir()
        names.append(str(make_checkpoint(tmp_path / str(i), 20, mel_bins=23, sections=sections, info=info)))
    with pytest.raises(InputError, match="does not say on how many hours it was trained"):
        learning_curve.main([names.pop(), *data])
    learning_curve.main([*names, *data])
    assert not (tmp_path / "curve.png").exists() and not (tmp_path / "curve.csv").exists()
    out = capsys.readouterr().out
    learning_curve.main([*names, *data, "--record"])
    assert capsys.readouterr().out == out
    rows = read_rows(tmp_path / "curve.csv")
    assert [row["way"] for row in rows] == ["greedy", "beam and CTC"] * 2
    assert [row["hours"] for row in rows[::2]] == ["0.0001", "0.00015"]
    assert "| CER, %, beam and CTC | " in out and "460 h, predicted" in out
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"
    learning_curve.main([])
    assert capsys.readouterr().out == out
    with (tmp_path / "curve.csv").open("a") as file:  # of another corpus, which the curve leaves out
        file.write(",".join((rows[0] | {"data": "other", "hours": "7"}).values()) + "\n")
    learning_curve.main([names[0], *data])
    assert capsys.readouterr().out == out
    (tmp_path / "curve.csv").unlink()
    with pytest.raises(InputError, match="two different amounts of speech, but curve.csv .* have 0; add"):
        learning_curve.main([])


def test_beams_are_counted_until_they_end_or_are_dropped():
    tokens = torch.tensor([[[5, 6, EOS]], [[5, EOS, 7]], [[EOS, EOS, EOS]], [[EOS, EOS, EOS]]])
    parents = torch.tensor([[[0, 0, 0]], [[0, 2, 1]], [[0, 1, 2]], [[0, 1, 2]]])
    scores = torch.zeros(4, 1, 3)
    scores[1:, 0, 2] = -torch.inf
    # 1 beam before the first step, then 2, then 1
    assert beam_threshold.count_beams(Steps(tokens, parents, scores, parents)) == (4, 3)


def test_each_checkpoint_and_split_has_a_curve_by_threshold():
    columns = ("checkpoint", "split", "threshold", "cer")
    values = [("a", "dev", 3, 1), ("a", "dev", 0, 2), ("a", "test", 3, 3), ("b", "dev", 3, 4), ("a", "dev", 3, 5)]
    curves = beam_threshold.latest([dict(zip(columns, map(str, row), strict=True)) for row in values])
    cers = {name: [row["cer"] for row in curve] for name, curve in curves.items()}
    assert cers == {"a, dev": ["2", "5"], "a, test": ["3"], "b, dev": ["4"]}


def test_a_beam_threshold_is_measured_against_the_search_without_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(beam_threshold, "FILE", tmp_path / "threshold.csv")
    monkeypatch.setattr(beam_threshold, "PICTURE", tmp_path / "threshold.png")
    make_manifest(tmp_path / "data", utterances=3)
    sections = {"model": replace(MODEL, ctc_layer=0), "decoding": DecodingConfig(beam=4, ctc_weight=0.5)}
    path = str(make_checkpoint(tmp_path, 20, mel_bins=23, sections=sections))
    options = ["--checkpoint", path, "--data", str(tmp_path / "data"), "--rounds", "1"]
    beam_threshold.main([*options, "--thresholds", "0.01", "1000", "--record"])
    none, low, high = rows = read_rows(tmp_path / "threshold.csv")
    assert [float(row["threshold"]) for row in rows] == [0, 0.01, 1000] and none["search_speed"] == "1.0"
    assert float(low["beams_per_step"]) < float(none["beams_per_step"]) == float(high["beams_per_step"])
    assert (high["cer"], high["other_texts"]) == (none["cer"], "0")
    out = capsys.readouterr().out
    assert out.index("| 0 (none) | ") < out.index("| 1000 | ") < out.index("| 0.01 | ")
    assert (tmp_path / "threshold.png").read_bytes()[:4] == b"\x89PNG"
    beam_threshold.main([])
    assert capsys.readouterr().out == out
    for wrong, message in (
        (["--checkpoint", path], "--checkpoint and --data go together"),
        ([*options, "--every", "0"], "--every and --rounds must be at least 1; got 0 and 1"),
        ([*options, "--thresholds", "0"], "--thresholds must be positive numbers"),
    ):
        with pytest.raises(InputError, match=message):
            beam_threshold.main(wrong)
    (tmp_path / "threshold.csv").unlink()
    with pytest.raises(InputError, match="no rows in threshold.csv yet; give --checkpoint and --data"):
        beam_threshold.main([])


def test_views_are_measured_as_decode_scores_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(views, "FILE", tmp_path / "views.csv")
    make_manifest(tmp_path / "data", utterances=5)
    path = str(make_checkpoint(tmp_path, 20, mel_bins=23, sections={"decoding": DecodingConfig(beam=2)}))
    data = ["--checkpoint", path, "--data", str(tmp_path / "data")]
    rows = ["--views", "1 / 1 / 0", "--views", "0.8 1.2/1 1.1/2.9"]
    views.main([*data, *rows, "--by", "source", "--record"])
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "| speeds | warps | view threshold | all, CER, % | made, CER, % | time |" and out[2].endswith(
        " | 1.00x |"
    )
    recorded = read_rows(tmp_path / "views.csv")
    keys = [tuple(row[name] for name in (*views.SETTINGS, "part", "utterances")) for row in recorded]
    expected = [("1", "1", "0"), ("0.8 1.2", "1 1.1", "2.9")]
    assert keys == [(*setting, part, "5") for setting in expected for part in ("all", "made")]
    for row in recorded[::2]:
        options = [word for name in views.SETTINGS for word in (f"--{name.replace('_', '-')}", *row[name].split())]
        decode.main([*data, "--split", "dev", "--out", str(tmp_path / "out.csv"), *options])
        assert float(row["cer"]) == pytest.approx(json.loads(capsys.readouterr().out.splitlines()[-1])["cer"], abs=0.01)
    for wrong in ("1 / 1", "1 / 1 /", "1 / 1 / 0 1", "a / 1 / 0"):
        with pytest.raises(SystemExit):
            views.main([*data, "--views", wrong])
        assert f"{wrong!r} must be speeds, warps and a threshold, such as" in capsys.readouterr().err


def test_scores_by_a_missing_column_are_an_error(tmp_path):
    make_manifest(tmp_path / "data", utterances=2)
    path = make_checkpoint(tmp_path, 20, mel_bins=23)
    with pytest.raises(InputError, match="does not have column 'dialect' on every line; choose another"):
        scores.main(["--checkpoint", str(path), "--data", str(tmp_path / "data"), "--by", "dialect"])
    archive = make_archive(tmp_path, "F23", utterances=2)
    path = make_checkpoint(tmp_path)
    with pytest.raises(InputError, match="is not a manifest, so it has no column 'source'"):
        scores.main(["--checkpoint", str(path), "--data", str(archive), "--split", "dev-clean", "--by", "source"])


def test_scores_by_a_column_of_a_manifest_of_json_lines(tmp_path):
    lines = [json.dumps({"path": f"{name}.wav", "text": "A", "source": kind}) for name, kind in ("ab", "cb", "da")]
    (tmp_path / "all.jsonl").write_text("\n".join(lines))
    actual = parts(["a", "c", "d"], tmp_path / "all.jsonl", ("all",), "source")
    assert actual == {"all": [0, 1, 2], "b": [0, 1], "a": [2]}


def test_scores_by_a_column_take_the_line_of_their_split(tmp_path):
    lines = [json.dumps({"id": "a", "path": f"{split}.wav", "text": "A", "split": split, "source": split[0]})
             for split in ("dev", "train", "test")]  # fmt: skip
    (tmp_path / "all.jsonl").write_text("\n".join(lines))
    actual = parts(["a"], tmp_path / "all.jsonl", ("dev",), "source")
    assert actual == {"all": [0], "d": [0]}
    both = parts(["dev/a", "test/a"], tmp_path / "all.jsonl", ("dev", "test"), "source")
    assert both == {"all": [0, 1], "d": [0], "t": [1]}


@pytest.mark.parametrize(
    ("module", "argv", "sentence"),
    [
        (recognition, ["nowhere"], "nowhere/log.jsonl does not exist; give a run folder"),
        (cost, ["--rounds", "0"], "--rounds at least 1; got 460, 0"),
        (cost, ["--hours", "-1"], "--hours must be above 0 .*; got -1, 3"),
    ],
)
def test_bad_arguments_are_a_one_sentence_error(module, argv, sentence):
    with pytest.raises(InputError, match=sentence):
        module.main(argv)


@pytest.mark.parametrize(("module", "argv"), [(recognition, []), (machine, ["--records"]), (machine, ["--help"])])
def test_bad_options_and_help_measure_nothing(module, argv, monkeypatch):
    monkeypatch.setattr(machine, "measure", lambda: pytest.fail("the machine was measured"))
    with pytest.raises(SystemExit):
        module.main(argv)
