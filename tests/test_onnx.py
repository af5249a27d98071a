"""Models in ONNX compute what las_fast computes, and the example that runs them returns the same texts."""

import inspect
import itertools
import json
import re
import subprocess
import sys
import wave
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from tiny_checkpoints import make_checkpoint
from tiny_corpora import make_archive

from benchmarks import onnx_texts
from las_fast import checkpoint, export
from las_fast.config import DecodingConfig, FeatureConfig, ListenerConfig, ModelConfig, SpellerConfig
from las_fast.data.features import add_deltas, compute_features
from las_fast.data.normalisation import Statistics, normalise
from las_fast.deploy import onnx_greedy
from las_fast.deploy.onnx_model import onnx_models
from las_fast.errors import InputError
from las_fast.recogniser import Recogniser
from las_fast.search.beam import greedy_search

EXAMPLE = Path(onnx_greedy.__file__)
SPELLER = SpellerConfig(key_size=6, value_size=10, embedding_size=8, lstm_sizes=(12, 9))
MODELS = {
    "convolutions": ModelConfig(
        ListenerConfig((8, 12), (5, 3), (2, 2), 8, pyramids=0, top_layers=2), SPELLER, ctc_layer=1
    ),
    "pyramids": ModelConfig(ListenerConfig((8,), (3,), (1,), 8, pyramids=2, top_layers=1), SPELLER, ctc_layer=0),
    "one cell": ModelConfig(
        ListenerConfig((8,), (3,), (1,), 8, pyramids=1), replace(SPELLER, lstm_sizes=(9,)), ctc_layer=-1
    ),
}
COUNTS = [37, 1, 20, 5]  # feature frames
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def make_model(folder, model, **features):
    """An untrained model with weights so large that different inputs have different outputs."""
    settings = FeatureConfig(kind="mfcc", size=7, **features)
    loaded = checkpoint.load_model(make_checkpoint(folder, sections={"features": settings, "model": model}))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.normal_(0, 0.4, generator=generator)
    if settings.normalisation == "global":
        loaded = loaded._replace(statistics=Statistics(torch.linspace(-1, 1, 7), torch.linspace(0.5, 2, 7)))
    return loaded


def sessions(loaded):
    return {part: onnxruntime.InferenceSession(content) for part, content in onnx_models(loaded).items()}


def utterances(counts=COUNTS, size=7):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(count, size, generator=generator) * 3 + 5 for count in counts]


def batch_of(arrays, filler=0.0):
    batch = torch.full((len(arrays), max(map(len, arrays)), arrays[0].shape[1]), filler)
    for row, array in zip(batch, arrays, strict=True):
        row[: len(array)] = array
    return batch, torch.tensor([len(array) for array in arrays])


def listen_in_torch(loaded, arrays):
    config = loaded.config.features
    inputs = [add_deltas(normalise(array, config, loaded.statistics), config.deltas) for array in arrays]
    with torch.inference_mode():
        return loaded.model.listen(*batch_of(inputs))


def test_a_setting_that_onnx_does_not_keep_is_refused():
    settings = DecodingConfig(beam=8)
    export.check_onnx_settings(settings, replace(settings, maximum_extra=3, maximum_share=0.2))
    message = "ONNX does not keep --decoding.beam, only --decoding.maximum-share and --decoding.maximum-extra; leave it"
    with pytest.raises(InputError, match=message):
        export.check_onnx_settings(settings, replace(settings, beam=4, maximum_extra=3))


def listen_in_onnx(session, arrays, filler=0.0):
    frames, counts = batch_of(arrays, filler)
    outputs = session.run(None, {"frames": frames.numpy(), "frame_counts": counts.numpy()})
    return dict(zip([one.name for one in session.get_outputs()], map(torch.from_numpy, outputs), strict=True))


FEATURES = [
    {"normalisation": "utterance", "deltas": 2},
    {"normalisation": "global", "deltas": 1},
    {"normalisation": "none", "deltas": 0},
]


@pytest.mark.parametrize("features", FEATURES, ids=lambda options: options["normalisation"])
@pytest.mark.parametrize("name", MODELS)
def test_the_listener_equals_that_of_torch(tmp_path, name, features):
    loaded = make_model(tmp_path, MODELS[name], **features)
    expected = listen_in_torch(loaded, utterances())
    actual = listen_in_onnx(sessions(loaded)["listener"], utterances())
    assert torch.equal(actual["lengths"], expected.lengths)
    valid = ~expected.padding
    for part in ("keys", "values"):
        torch.testing.assert_close(actual[part][valid], getattr(expected, part)[valid], **CLOSE)
    assert ("ctc_logits" in actual) == (MODELS[name].ctc_layer >= 0)
    if "ctc_logits" in actual:
        assert torch.equal(actual["ctc_lengths"], expected.ctc_lengths)
        for i, count in enumerate(expected.ctc_lengths.tolist()):
            torch.testing.assert_close(actual["ctc_logits"][i, :count], expected.ctc_logits[i, :count], **CLOSE)


def test_an_utterance_has_the_same_memory_alone_and_next_to_any_padding(tmp_path):
    session = sessions(make_model(tmp_path, MODELS["pyramids"], deltas=2))["listener"]
    together = [listen_in_onnx(session, utterances(), filler) for filler in (0.0, 1e4)]
    for i, array in enumerate(utterances()):
        alone = listen_in_onnx(session, [array])
        count = int(alone["lengths"][0])
        for memory in together:
            torch.testing.assert_close(memory["keys"][i, :count], alone["keys"][0, :count], **CLOSE)


def test_a_constant_coefficient_becomes_zero_as_in_torch(tmp_path):
    loaded = make_model(tmp_path, MODELS["one cell"], normalisation="utterance")
    arrays = utterances()
    arrays[0][:, 3] = 1234.5
    expected = listen_in_torch(loaded, arrays)
    actual = listen_in_onnx(sessions(loaded)["listener"], arrays)["keys"]
    torch.testing.assert_close(actual[~expected.padding], expected.keys[~expected.padding], **CLOSE)


@pytest.mark.parametrize("name", MODELS)
def test_steps_of_the_speller_equal_those_of_torch_for_any_beam(tmp_path, name):
    loaded = make_model(tmp_path, MODELS[name])
    memory = listen_in_torch(loaded, utterances())
    speller, beam = sessions(loaded)["speller"], 3
    fixed = {"keys": memory.keys.numpy(), "values": memory.values.numpy(), "lengths": memory.lengths.numpy()}
    with torch.inference_mode():
        state = loaded.model.start(memory, beam)
    names = [one.name for one in speller.get_inputs()][4:]
    fed = {one.name: np.zeros((len(COUNTS), beam, one.shape[2]), np.float32) for one in speller.get_inputs()[4:]}
    generator = torch.Generator().manual_seed(4)
    for _ in range(4):
        tokens = torch.randint(0, loaded.model.vocabulary_size, (len(COUNTS), beam), generator=generator)
        with torch.inference_mode():
            logits, read, state = loaded.model.step(tokens, state, memory)
        actual, attended, *new_state = speller.run(None, {"tokens": tokens.numpy(), **fixed, **fed})
        torch.testing.assert_close(torch.from_numpy(actual), logits, **CLOSE)
        assert np.array_equal(attended, read.peaks.numpy())
        expected = [*itertools.chain(*zip(state.hidden, state.cell, strict=True)), state.context]
        for one, other in zip(new_state, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(one), other, **CLOSE)
        assert [one.name for one in speller.get_outputs()][2:] == [f"next_{name}" for name in names]
        fed = dict(zip(names, new_state, strict=True))


def write_model(folder, loaded, settings=None):
    """Export to folder/mine.onnx and load it with the example."""
    out = folder / "mine.onnx"
    export.export_onnx(loaded, export.DecodingSettings(settings or loaded.config.decoding), out)
    return onnx_greedy.Recogniser(str(out))


@pytest.mark.parametrize("settings", [DecodingConfig(), DecodingConfig(maximum_share=0.1, maximum_extra=0)])
def test_the_example_ends_each_text_where_the_search_does(tmp_path, settings):
    loaded = make_model(tmp_path, MODELS["convolutions"])
    with torch.no_grad():
        loaded.model.speller.bias[2] = -50  # never <eos>
    hypotheses = greedy_search(loaded.model, listen_in_torch(loaded, utterances()), settings)
    expected = [loaded.vocabulary.decode(best.text_tokens) for (best,) in hypotheses]
    actual = write_model(tmp_path, loaded, settings).greedy([array.numpy() for array in utterances()])
    assert actual == expected and len(set(map(len, actual))) > 1


def test_the_example_returns_the_greedy_texts_of_an4(tmp_path, shared):
    loaded = checkpoint.load_model("an4")
    greedy = replace(loaded.config.decoding, beam=1, ctc_weight=0.0)
    loaded = loaded._replace(config=replace(loaded.config, decoding=greedy))
    frames = [np.load(name).astype(np.float32) for name in sorted((shared / "an4").rglob("dev/mfcc/*.npy"))[:12]]
    texts = [best.text for best, *_ in Recogniser(loaded, torch.device("cpu")).decode(frames)]
    assert write_model(tmp_path, loaded).greedy(frames) == texts and all(texts)


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "logmel", "size": 80},
        {"kind": "mfcc", "size": 13, "mel_bins": 23},
        {"kind": "mfcc", "size": 13, "mel_bins": 23, "lifter": 0.0},
        {"kind": "mfcc", "size": 13, "mel_bins": 23, "lifter": 10.0},
        {"kind": "logmel", "size": 20, "sample_rate": 8000, "window_ms": 20.0, "shift_ms": 12.5},
    ],
)
@pytest.mark.parametrize("count", [16000, 100])
def test_the_features_of_the_example_are_those_of_las_fast(settings, count):
    config = FeatureConfig(**settings)
    samples = np.random.default_rng(1).normal(0, 0.1, count).clip(-1, 1).astype(np.float32)
    (expected,) = compute_features([samples], config)
    actual = onnx_greedy.features(samples, export_features(config))
    np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-3, atol=2e-3)


def export_features(config):
    return json.loads(json.dumps(vars(config)))


def test_the_example_runs_without_torch_from_wav_and_from_features(tmp_path):
    loaded = make_model(tmp_path, MODELS["convolutions"])
    model = write_model(tmp_path, loaded)
    samples = (np.random.default_rng(1).normal(0, 0.1, 8000).clip(-1, 1) * 32767).astype("<i2")
    with wave.open(str(tmp_path / "talk.WAV"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(samples.tobytes())
    frames = onnx_greedy.features(samples / 32768, model.settings["features"])
    np.save(tmp_path / "talk.npy", frames)
    code = (
        "import sys, runpy; sys.modules['torch'] = None; sys.modules['las_fast'] = None\n"
        "sys.argv = ['onnx_greedy.py', 'mine.onnx', 'talk.WAV', 'talk.npy']\n"
        f"runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    (text,) = model.greedy([frames])
    assert done.stdout.splitlines() == [f"talk.WAV: {text}", f"talk.npy: {text}"], done.stderr


def test_the_example_says_which_wav_it_needs(tmp_path):
    with wave.open(str(tmp_path / "talk.wav"), "wb") as file:
        file.setparams((2, 2, 44100, 0, "NONE", ""))
        file.writeframes(bytes(400))
    with pytest.raises(SystemExit, match=r"\(44100, 2, 16\); the model needs \(16000, 1, 16\)"):
        onnx_greedy.read_wav(str(tmp_path / "talk.wav"), 16000)


@pytest.mark.parametrize(("cut", "message"), [(44, "has 0 of"), (144, "has 50 of"), (145, "has 50 of")])
def test_the_example_refuses_a_wav_without_its_samples(tmp_path, cut, message):
    with wave.open(str(tmp_path / "talk.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(bytes(200))
    (tmp_path / "talk.wav").write_bytes((tmp_path / "talk.wav").read_bytes()[:cut])
    with pytest.raises(SystemExit, match=f"{message} the 100 samples it announces; copy it again"):
        onnx_greedy.read_wav(str(tmp_path / "talk.wav"), 16000)


def test_a_file_that_is_not_wav_is_one_sentence(tmp_path):
    (tmp_path / "talk.wav").write_bytes(b"ID3 not wav")
    for name in ("talk.wav", "missing.wav"):
        with pytest.raises(SystemExit, match=rf"{name} cannot be read as wav \(.*\); convert it to 16000 Hz, one"):
            onnx_greedy.read_wav(str(tmp_path / name), 16000)


def test_only_wav_and_npy_are_read_and_other_files_are_one_sentence(tmp_path):
    settings = export_features(FeatureConfig(kind="mfcc", size=7))
    (tmp_path / "text.npy").write_text("HELLO")
    (tmp_path / "empty.npy").touch()
    np.save(tmp_path / "flat.npy", np.zeros(7, np.float32))
    np.save(tmp_path / "none.npy", np.zeros((0, 7), np.float32))
    np.save(tmp_path / "wide.npy", np.zeros((3, 8), np.float32))
    np.save(tmp_path / "nan.npy", np.full((3, 7), np.nan, np.float32))
    np.save(tmp_path / "good.npy", np.ones((3, 7), np.float32))
    for name, message in {
        "talk.ogg": "talk.ogg: give a wav file or .npy features$",
        "text.npy": r"text.npy cannot be read as .npy \(.*\); give a wav file or .npy features$",
        "empty.npy": "empty.npy cannot be read as .npy",
        "missing.npy": "missing.npy cannot be read as .npy",
        "flat.npy": r"has shape \(7,\) and type float32; the model needs \(T, 7\)",
        "none.npy": r"has shape \(0, 7\)",
        "wide.npy": r"has shape \(3, 8\)",
        "nan.npy": "nan.npy contains NaN or infinite values; compute it again",
    }.items():
        with pytest.raises(SystemExit, match=message):
            onnx_greedy.read_frames(str(tmp_path / name), settings)
    assert onnx_greedy.read_frames(str(tmp_path / "good.npy"), settings).shape == (3, 7)


def test_a_wrong_model_of_the_example_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path, make_model(tmp_path, MODELS["one cell"]))
    assert onnx_greedy.open_model("mine.onnx").settings["features"]["size"] == 7
    for name, message in (
        ("nosuch.onnx", "nosuch.listener.onnx does not exist; write it by las_fast.export --format onnx --out"),
        ("mine.listener.onnx", "mine.listener.onnx is one of the two files of a model; give mine.onnx, which"),
        ("mine.speller.onnx", "mine.speller.onnx is one of the two files of a model; give mine.onnx, which"),
    ):
        with pytest.raises(SystemExit, match=f"^{message}"):
            onnx_greedy.open_model(name)
    (tmp_path / "mine.speller.onnx").write_bytes(b"not a model")
    with pytest.raises(SystemExit, match=r"mine.onnx is not a model that las_fast.export wrote \(.*\); export it"):
        onnx_greedy.open_model("mine.onnx")


@pytest.mark.parametrize(("words", "status"), [(["--help"], 0), (["mine.onnx", "-h"], 0), ([], 1)])
def test_the_example_prints_its_usage(words, status):
    done = subprocess.run([sys.executable, EXAMPLE, *words], capture_output=True, text=True)
    printed = done.stderr if status else done.stdout
    assert done.returncode == status and "python onnx_greedy.py mine.onnx talk.wav" in printed


def test_the_greedy_search_of_the_example_has_at_most_40_lines():
    assert len(inspect.getsource(onnx_greedy.Recogniser).splitlines()) <= 40


# ---------------------------------------------------------------------------------------------------------- The command


def run_export(path, out, *argv):
    export.main(["--checkpoint", str(path), "--out", str(out), *argv])


def test_two_files_are_written_and_named(tmp_path, capsys):
    path, out = make_checkpoint(tmp_path), tmp_path / "new" / "a.b.onnx"
    run_export(path, out, "--format", "onnx", "--decoding.maximum-extra", "3")
    lines = capsys.readouterr().out.splitlines()
    files = [tmp_path / "new" / f"a.b.{part}.onnx" for part in ("listener", "speller")]
    assert sorted((tmp_path / "new").iterdir()) == files
    assert lines == [f"written     {file} ({file.stat().st_size / 1e6:.1f} MB)" for file in files]
    assert onnx_greedy.Recogniser(str(out)).settings["maximum_extra"] == 3


@pytest.mark.parametrize(
    ("name", "argv", "message"),
    [
        ("a.onnx", [], "a.onnx has the suffix of onnx, but the format is safetensors; add --format onnx, or give a "
         "name that ends in .safetensors"),
        ("a.safetensors", ["--format", "onnx"], "has the suffix of safetensors, but the format is onnx; add --format "),
        ("a", ["--format", "onnx"], "a: the output is a model; give a name that ends in .onnx"),
        ("a.pt", ["--format", "onnx"], "a.pt: the output is a model; give a name that ends in .onnx"),
        ("a", [], "a: the output is a model; give a name that ends in .safetensors"),
        ("a.bin", [], "a.bin: the output is a model; give a name that ends in .safetensors"),
    ],
)  # fmt: skip
def test_a_suffix_that_is_not_that_of_the_format_is_refused(tmp_path, name, argv, message):
    path = make_checkpoint(tmp_path)
    with pytest.raises(InputError, match=message):
        run_export(path, tmp_path / name, *argv)
    assert list(tmp_path.iterdir()) == [path]


def test_an_earlier_export_is_replaced_and_another_file_is_not(tmp_path):
    path, out = make_checkpoint(tmp_path), tmp_path / "a.onnx"
    for _ in range(2):
        run_export(path, out, "--format", "onnx")
    listener = (tmp_path / "a.listener.onnx").read_bytes()
    (tmp_path / "a.speller.onnx").write_bytes(b"another model")
    with pytest.raises(InputError, match="a.speller.onnx exists and is not a model in ONNX"):
        run_export(path, out, "--format", "onnx")
    assert (tmp_path / "a.listener.onnx").read_bytes() == listener


def test_a_missing_onnx_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "is_installed", lambda name: False)
    with pytest.raises(InputError, match="--format onnx needs the package onnx; run: pip install onnx"):
        run_export(make_checkpoint(tmp_path), tmp_path / "a.onnx", "--format", "onnx")


def test_the_command_refuses_settings_that_onnx_does_not_keep(tmp_path):
    path = make_checkpoint(tmp_path)
    with pytest.raises(InputError, match="ONNX does not keep --decoding.ctc-weight, only"):
        run_export(path, tmp_path / "a.onnx", "--format", "onnx", "--decoding.ctc-weight", "0.5")
    assert list(tmp_path.iterdir()) == [path]


# -------------------------------------------------------------------------------------------------------- The benchmark


def test_the_benchmark_compares_texts_and_logits(tmp_path, capsys, monkeypatch):
    path = make_checkpoint(tmp_path)
    argv = ["--checkpoint", str(path), "--data", str(make_archive(tmp_path / "data", "F23"))]
    onnx_texts.main(argv)
    first, second = capsys.readouterr().out.splitlines()
    count, distance = re.fullmatch(r"(\d+) utterances, \d+ s: 0 texts differ, logits by at most (\S+)", first).groups()
    assert int(count) > 0 and float(distance) < 1e-4 and "onnxruntime" in second
    monkeypatch.setattr(onnx_greedy.Recogniser, "greedy", lambda self, utterances: ["?"] * len(utterances))
    with pytest.raises(InputError, match="the texts of .* differ; report a bug of export --format onnx"):
        onnx_texts.main(argv)
