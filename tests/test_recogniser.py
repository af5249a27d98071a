"""The Python API gives the same texts as the commands, for every kind of recording."""

from __future__ import annotations

import errno
import io
import json
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from rounding import assert_equal_up_to_rounding
from tiny_checkpoints import MODEL, make_checkpoint
from tiny_corpora import make_archive, make_speech

import las_fast
from las_fast import decode, lm, recogniser, transcribe
from las_fast.config import DecodingConfig
from las_fast.errors import InputError
from las_fast.ops import backends
from las_fast.output.formats import FORMATS, word_row
from las_fast.search import beam, dataset, ngram
from las_fast.search.confidence import Calibration, LogisticRegression, calibration_path_for

RATE = 16000
BOTH = np.stack([make_speech(1.0, rate=22050, seed=1), 0.5 * make_speech(1.0, rate=22050, seed=3)], 1)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with recordings, an archive, untrained checkpoints for both, and one with a language model."""
    folder = tmp_path_factory.mktemp("recogniser")
    make_archive(folder, "F23", utterances=4)
    make_checkpoint(folder)
    make_checkpoint(folder, 20, mel_bins=23)
    (folder / "lm").mkdir()
    recogniser = {"decoding": DecodingConfig(beam=3, ngram_weight=2.0)}
    make_checkpoint(folder / "lm", 20, mel_bins=23, sections=recogniser)
    ngram.save_lm(folder / "lm" / "untrained-20.lm.safetensors", lm.train(["HELLO THERE", "HELLO"], order=2))
    ngram.save_lm(folder / "other.lm.safetensors", lm.train(["ZZ ZZ ZZZZ", "Z"], order=2))
    soundfile.write(folder / "short.wav", make_speech(0.6), RATE)
    soundfile.write(folder / "stereo.wav", BOTH, 22050, subtype="FLOAT")
    soundfile.write(folder / "high.wav", make_speech(0.8, rate=48000, seed=4), 48000)
    soundfile.write(folder / "phone.wav", make_speech(0.6, rate=8000, seed=5), 8000)
    soundfile.write(folder / "long.wav", make_speech(25.0, seed=2), RATE)
    return folder


@pytest.fixture(scope="module")
def model(workspace):
    return las_fast.load(workspace / "untrained-20.safetensors", device="cpu")


def output_of_the_command(capsys, checkpoint, recording, *argv):
    """The JSON row and the warnings of the transcribe command."""
    model = ["--checkpoint", str(checkpoint), "--device", "cpu", "--format", "json"]
    transcribe.main([str(recording), *model, *argv])
    out, err = capsys.readouterr()
    return json.loads(out), [line.removeprefix("warning: ") for line in err.splitlines()]


def call_with_warnings(function, *arguments, **options):
    """The result of a call and the messages of its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return function(*arguments, **options), [str(one.message) for one in caught]


def test_importing_las_fast_loads_neither_torch_nor_numpy():
    code = """
import sys, las_fast
assert las_fast.__version__ and set(las_fast.__all__) <= set(dir(las_fast))
las_fast.InputError
print(sorted({"torch", "numpy", "soundfile"} & set(sys.modules)))
from las_fast import LAS
print(LAS.__name__, "torch" in sys.modules, las_fast.ops.beam_topk.__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[]", "LAS True beam_topk"], done.stderr


def test_exactly_the_public_names_are_exported():
    assert all(getattr(las_fast, name) is not None for name in las_fast.__all__)
    assert las_fast.load is recogniser.load and las_fast.InputError is InputError
    with pytest.raises(AttributeError, match="module 'las_fast' has no attribute 'lode'"):
        las_fast.lode  # noqa: B018


def in_memory(name, dtype="float32"):
    return lambda folder: soundfile.read(folder / name, dtype=dtype)


SAME = {
    "str": lambda folder: (str(folder / "short.wav"), None),
    "Path": lambda folder: (folder / "short.wav", None),
    "open file": lambda folder: ((folder / "short.wav").open("rb"), None),
    "BytesIO": lambda folder: (io.BytesIO((folder / "short.wav").read_bytes()), None),
    "float32": in_memory("short.wav"),
    "float64": in_memory("short.wav", "float64"),
    "int16": in_memory("short.wav", "int16"),
    "int32": in_memory("short.wav", "int32"),
    "one column": lambda folder: (soundfile.read(folder / "short.wav", always_2d=True)[0], RATE),
    "tensor": lambda folder: (torch.from_numpy(soundfile.read(folder / "short.wav", dtype="float32")[0]), RATE),
    "int16 tensor": lambda folder: (torch.from_numpy(soundfile.read(folder / "short.wav", dtype="int16")[0]), RATE),
    "tensor with gradient": lambda folder: (
        torch.from_numpy(soundfile.read(folder / "short.wav")[0]).requires_grad_(), float(RATE)
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SAME)
def test_every_kind_of_recording_gives_the_commands_transcript(workspace, model, capsys, kind):
    row, _ = output_of_the_command(capsys, workspace / "untrained-20.safetensors", workspace / "short.wav")
    actual = model.transcribe(*SAME[kind](workspace))
    assert actual.text == str(actual) == row["text"] and len(row["text"]) > 3
    names = ("start", "end", "text", "score", "mean_score", "speech_score")
    rows = [{name: rounded(getattr(segment, name)) for name in names} for segment in actual.segments]
    for i, (one, segment) in enumerate(zip(rows, actual.segments, strict=True)):
        one |= {"id": i, "words": [word_row(word) for word in segment.words]}
    assert rows == row["segments"] and [word.text for word in actual.words] == actual.text.split()


def rounded(value):
    return round(value, 4) if isinstance(value, float) else value


@pytest.mark.parametrize("name", ["stereo.wav", "high.wav", "long.wav"])
def test_arrays_of_any_rate_and_channels_match_the_file(workspace, model, capsys, name):
    row, _ = output_of_the_command(capsys, workspace / "untrained-20.safetensors", workspace / name, "--beam", "2")
    actual = model.transcribe(*in_memory(name)(workspace), beam=2)
    count = 2 if name == "long.wav" else 1
    assert actual.text == row["text"] and len(actual.segments) == len(row["segments"]) == count
    assert actual == model.transcribe(workspace / name, beam=2)


def test_half_precision_and_other_memory_layouts_are_read(workspace, model):
    samples, rate = soundfile.read(workspace / "stereo.wav", dtype="float32")
    expected = model.transcribe(samples.astype(np.float16), rate, beam=1)
    assert model.transcribe(torch.from_numpy(samples).half(), rate, beam=1) == expected
    assert model.transcribe(np.asfortranarray(samples.astype(">f4")), rate, beam=1) == model.transcribe(
        samples, rate, beam=1
    )
    assert model.transcribe(torch.from_numpy(samples).bfloat16(), rate, beam=1).segments


def test_a_file_object_is_read_from_its_position(workspace, model):
    file = io.BytesIO(b"garbage" + (workspace / "short.wav").read_bytes())
    file.seek(7)
    assert model.transcribe(file, beam=1) == model.transcribe(workspace / "short.wav", beam=1)
    assert not file.closed


def test_telephone_speech_is_a_warning_as_in_the_command(workspace, model, capsys):
    _, expected = output_of_the_command(
        capsys, workspace / "untrained-20.safetensors", workspace / "phone.wav", "--beam", "1"
    )
    assert [
        f"{workspace / 'phone.wav'} is sampled at 8000 Hz, but the model was trained at 16000 Hz; expect more errors"
    ] == (expected)
    assert call_with_warnings(model.transcribe, workspace / "phone.wav", beam=1)[1] == expected
    array = in_memory("phone.wav")(workspace)
    assert call_with_warnings(model.transcribe, *array, beam=1)[1] == [
        "the array is sampled at 8000 Hz, but the model was trained at 16000 Hz; expect more errors"
    ]
    with pytest.warns(UserWarning) as caught:
        model.transcribe(*array, beam=1)
    assert caught[0].filename == __file__


def test_the_default_dtype_of_torch_does_not_matter(workspace, model):
    expected = model.transcribe(workspace / "short.wav", beam=2)
    torch.set_default_dtype(torch.float64)
    try:
        other = las_fast.load(workspace / "untrained-20.safetensors", device="cpu")
        assert other.transcribe(workspace / "short.wav", beam=2) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_16_bit_samples_in_floats_are_rescaled(workspace, model):
    samples, rate = soundfile.read(workspace / "short.wav", dtype="int16")
    actual, messages = call_with_warnings(model.transcribe, samples.astype(np.float32), rate, beam=1)
    assert actual == model.transcribe(samples, rate, beam=1)
    sentence = "its samples are 16-bit numbers stored as floating point; they were divided by 32768"
    assert messages == [f"the array: {sentence}"]


def test_silence_is_an_empty_transcript_with_a_warning(model):
    actual, messages = call_with_warnings(model.transcribe, np.zeros(RATE), RATE)
    assert actual == las_fast.Transcript("", (), duration=1.0)
    assert messages == ["the array: no speech was found in its 1.00 seconds"]


SPEECH = make_speech(0.3)


class Failing:
    """A file object of a broken connection, or one without data."""

    def __init__(self, *data):
        self.data = data

    def read(self, count):
        if not self.data:
            raise ConnectionResetError(errno.ECONNRESET, "Connection reset")
        return self.data[0]


INVALID_RECORDINGS = {
    "no rate": (SPEECH, None, {}, "an array has no sample rate of its own; give its rate in Hz"),
    "a rate of 0": (SPEECH, 0, {}, "sample_rate must be a whole number of Hz from 1000 to 768000; got 0"),
    "a rate of text": (SPEECH, "16000", {}, "sample_rate must be a whole number of Hz .*; got '16000'"),
    "a broken rate": (SPEECH, 16000.5, {}, "sample_rate must be a whole number of Hz .*; got 16000.5"),
    "a rate of NaN": (SPEECH, float("nan"), {}, "sample_rate must be a whole number of Hz .*; got nan"),
    "True as a rate": (SPEECH, True, {}, "sample_rate must be a whole number of Hz .*; got True"),
    "channels first": (BOTH.T, 22050, {}, r"shape \(N,\) or \(N, channels\); got \(2, 22050\); give array.T"),
    "features": (np.zeros((500, 80)), RATE, {}, r"got \(500, 80\); give at most 64 channels"),
    "three axes": (np.zeros((2, 3, 4)), RATE, {}, r"shape \(N,\) or \(N, channels\); got \(2, 3, 4\)"),
    "a number": (np.array(1.0), RATE, {}, r"shape \(N,\) or \(N, channels\); got \(\)"),
    "nothing": (np.zeros(0), RATE, {}, r"the array has no samples: its shape is \(0,\)"),
    "no channel": (np.zeros((9, 0)), RATE, {}, r"the array has no samples: its shape is \(9, 0\)"),
    "int64": (np.zeros(9, np.int64), RATE, {}, "must be float, int16 or int32; got int64; convert them"),
    "uint8": (np.zeros(9, np.uint8), RATE, {}, "must be float, int16 or int32; got uint8"),
    "complex": (torch.zeros(9, dtype=torch.complex64), RATE, {}, "must be float, int16 or int32; got complex64"),
    "NaN": (np.full(4000, np.nan), RATE, {}, "the array contains NaN, infinite or enormous samples"),
    "too large for float32": (np.full(4000, 1e300), RATE, {}, "the array contains NaN, infinite or enormous samples"),
    "a list": (
        [0.0, 0.1],
        RATE,
        {},
        "a recording is a path, a binary file object or an array; got a value of type list",
    ),
    "None": (None, None, {}, "a recording is a path, a binary file object or an array; got None"),
    "bytes": (b"RIFF", None, {}, "a recording is a path, .*; got a value of type bytes"),
    "a rate of a file": ("short.wav", RATE, {}, "short.wav states its own rate; omit sample_rate"),
    "a missing file": ("gone.wav", None, {}, "gone.wav does not exist"),
    "text": (io.StringIO("RIFF"), None, {}, "the file object returns text instead of bytes; open it with open"),
    "an error on reading": (Failing(), None, {}, r"the file object cannot be read \(Connection reset\); open it again"),
    "no data yet": (Failing(None), None, {}, "the file object has no data yet; give a file object whose read"),
    "no bytes": (io.BytesIO(), None, {}, r"the file object is empty \(0 bytes\)"),
    "no audio": (io.BytesIO(b"not audio"), None, {}, "the file object cannot be read as audio"),
    "beam 0": (SPEECH, RATE, {"beam": 0}, "decoding.beam must be at least 1; got 0"),
    "beam 1e9": (SPEECH, RATE, {"beam": 10**9}, "decoding.beam must be at most 1000"),
    "beam 2.0": (SPEECH, RATE, {"beam": 2.0}, "beam must be a whole number; got 2.0"),
    "beam True": (SPEECH, RATE, {"beam": True}, "beam must be a whole number; got True"),
    "threshold -1": (
        SPEECH,
        RATE,
        {"beam_threshold": -1},
        "beam_threshold must be a number of at least 0; got -1",
    ),
    "threshold inf": (SPEECH, RATE, {"beam_threshold": np.inf}, "decoding.beam_threshold must be a finite number"),
    "threshold '3'": (SPEECH, RATE, {"beam_threshold": "3"}, "beam_threshold must be a number of at least 0; got '3'"),
    "no speed": (SPEECH, RATE, {"speeds": []}, "decoding.speeds and decoding.warps need a value each; 1 means"),
    "speed '1'": (SPEECH, RATE, {"speeds": ["1"]}, r"speeds must be a number or a list of numbers; got \['1'\]"),
    "speed True": (SPEECH, RATE, {"speeds": True}, "speeds must be a number or a list of numbers; got True"),
    "speeds True": (SPEECH, RATE, {"speeds": [1, True]}, "speeds must be a number or a list of numbers; got"),
    "threshold True": (
        SPEECH,
        RATE,
        {"beam_threshold": True},
        "beam_threshold must be a number of at least 0",
    ),
    "a table": (SPEECH, RATE, {"speeds": np.ones((1, 2))}, "speeds must be a number or a list of numbers; got array"),
    "a dict": (SPEECH, RATE, {"warps": {1.0: 2}}, "warps must be a number or a list of numbers; got {1.0: 2}"),
    "warps '1'": (SPEECH, RATE, {"warps": "1"}, "warps must be a number or a list of numbers; got '1'"),
    "warp 2": (SPEECH, RATE, {"warps": (1, 2)}, "decoding.warps must be at most 1.5; got 2"),
    "three warps": (
        SPEECH,
        RATE,
        {"speeds": (1, 0.9), "warps": (1, 1, 1)},
        "decoding.speeds has 2 values and decoding.warps 3; give",
    ),
    "view threshold '1'": (SPEECH, RATE, {"view_threshold": "1"}, "view_threshold must be a number of at least"),
    "view threshold -1": (SPEECH, RATE, {"view_threshold": -1}, "view_threshold must be a number of at least"),
    "view threshold inf": (SPEECH, RATE, {"view_threshold": np.inf}, "decoding.view_threshold must be a finite number"),
    "view threshold NaN": (SPEECH, RATE, {"view_threshold": np.nan}, "view_threshold must be a number of at least"),
    "precision fp16": (SPEECH, RATE, {"precision": "fp16"}, "precision must be one of 'auto', 'fp32', 'bf16', 'int8'"),
    "precision []": (SPEECH, RATE, {"precision": []}, "precision must be one of 'auto', 'fp32', 'bf16', 'int8'"),
    "warp NaN": (SPEECH, RATE, {"warps": (np.nan,)}, "decoding.warps must be a finite number; got nan"),
    "nbest 0": (SPEECH, RATE, {"nbest": 0}, "nbest must be a whole number of at least 1; got 0"),
    "nbest 1001": (SPEECH, RATE, {"nbest": 1001}, "nbest must be at most 1000, the largest beam; got 1001"),
    "empty path": ("", None, {}, "^the path of the recording is empty; give one$"),
    "nbest 3": (SPEECH, RATE, {"nbest": 3, "beam": 2}, "nbest=3 needs a beam of at least 3; give beam=3"),
    "a missing lm": (SPEECH, RATE, {"lm": "gone"}, "lm=gone is not a file"),
    "lm True": (SPEECH, RATE, {"lm": True}, "lm must be a path, the name of a released model, None or False; got"),
    "an unknown vad": (SPEECH, RATE, {"vad": "webrtc"}, "vad must be 'energy' or 'silero'; got 'webrtc'"),
    "NaN as a limit": (SPEECH, RATE, {"min_speech_score": np.nan}, "min_speech_score must be a number; got nan"),
}


@pytest.mark.parametrize("speed", [0.9, np.float32(0.9), np.array(0.9), [0.9], (0.9,), np.array([0.9])])
def test_a_single_speed_needs_no_list(model, speed):
    assert model.settings(speeds=speed).speeds == pytest.approx((0.9,))


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_precision_reaches_the_search(model, precision):
    if precision == "int8" and (reason := backends.unavailable("speller_search", "cpp")):
        pytest.skip(reason)
    features = np.random.default_rng(0).standard_normal((60, 20))
    scores = {name: model.decode(features, precision=name)[0].score for name in ("auto", "fp32", precision)}
    assert scores["auto"] == scores["fp32"] != scores[precision] == pytest.approx(scores["fp32"], rel=0.05)
    assert model.settings(precision=precision) == replace(model.settings(), precision=precision)


def test_a_beam_threshold_drops_hypotheses(model):
    features = np.random.default_rng(0).standard_normal((60, model.loaded.config.features.size))
    counts = [len(model.decode(features, beam=4, beam_threshold=x, nbest=4)) for x in (0, 1e-4)]
    (segment,) = model.transcribe(SPEECH, RATE, beam=4, beam_threshold=1e-4, nbest=4, min_speech_score=-np.inf).segments
    assert counts[0] == 4 and counts[1] < 4 and len(segment.nbest) < 4


@pytest.mark.parametrize("case", INVALID_RECORDINGS)
def test_invalid_arguments_are_a_one_sentence_error(workspace, model, monkeypatch, case):
    monkeypatch.chdir(workspace)
    recording, rate, options, message = INVALID_RECORDINGS[case]
    with pytest.raises(InputError, match=message) as caught:
        model.transcribe(recording, rate, **options)
    assert "\n" not in str(caught.value) and "--" not in str(caught.value)


def test_a_closed_file_is_a_one_sentence_error(workspace, model):
    file = (workspace / "short.wav").open("rb")
    file.close()
    with pytest.raises(InputError, match=r"short.wav cannot be read \(.*closed file\); open it again with open"):
        model.transcribe(file)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("englis",), "checkpoint englis is neither a run folder nor a file; .*; the nearest is english"),
        ((None,), "a checkpoint is the name of a released model or a path; got None"),
        (("an4", "cuda:77"), "device=cuda:77: there is no such device here; this machine has cpu"),
    ],
)
def test_a_missing_model_or_device_is_a_one_sentence_error(arguments, message):
    name, device = (*arguments, "cpu")[:2]
    with pytest.raises(InputError, match=message):
        las_fast.load(name, device=device)


@pytest.mark.parametrize("form", FORMATS)
def test_a_saved_transcript_has_the_bytes_that_the_command_writes(workspace, model, tmp_path, form):
    argv = ["--checkpoint", str(workspace / "untrained-20.safetensors"), "--device", "cpu"]
    options = {"width": 20, "lines": 1} if form in ("srt", "vtt") else {}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    if form == "vtt":
        options["word_times"], words = True, [*words, "--word-times"]
    file = tmp_path / f"talk{FORMATS[form].suffix}"
    transcribe.main([str(workspace / "short.wav"), *argv, *words, "--out", str(file)])
    transcript = model.transcribe(str(workspace / "short.wav"))
    transcript.save(tmp_path / "new" / file.name, **options)
    expected = file.read_bytes()
    assert (tmp_path / "new" / file.name).read_bytes() == expected and len(expected) > 4
    assert transcript.to_string(form, **options).encode() == expected


def test_a_transcript_has_the_path_of_its_recording(workspace, model):
    path = workspace / "short.wav"
    assert model.transcribe(path).recording == str(path)
    with path.open("rb") as file:
        transcript = model.transcribe(file)
    assert transcript.recording is None and json.loads(transcript.to_string("json"))["file"] is None
    ((_, one),) = model.transcribe_all([str(path)])
    assert one.recording == str(path) and one == transcript


def test_results_are_typed_frozen_and_short_to_print(workspace, model):
    actual = model.transcribe(workspace / "long.wav", beam=2, nbest=2)
    assert type(actual) is las_fast.Transcript and {type(segment) for segment in actual.segments} == {las_fast.Segment}
    assert repr(actual) == f"Transcript({actual.text[:60] + '...'!r}, 2 segments)" and len(repr(model)) < 60
    assert "untrained-20 on cpu" in repr(model) and "Hypothesis" not in repr(actual.segments[0])
    with pytest.raises(FrozenInstanceError):
        actual.text = ""
    assert actual.text == " ".join(segment.text for segment in actual.segments)


def test_a_run_folder_loads_as_a_model_named_after_it(workspace, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "best.safetensors").write_bytes((workspace / "untrained-20.safetensors").read_bytes())
    assert "mine on cpu" in repr(las_fast.load(tmp_path / "mine", device=torch.device("cpu")))


def test_nbest_starts_with_the_text_and_is_sorted(workspace, model):
    (segment,) = model.transcribe(workspace / "short.wav", beam=4, nbest=3).segments
    best, *others = segment.nbest
    assert (best.text, best.score, best.mean_score) == (segment.text, segment.score, segment.mean_score)
    assert len({one.text for one in segment.nbest}) == 3 and best.mean_score == best.score / (len(best.text) + 1)
    assert len(model.transcribe(workspace / "short.wav", beam=4).segments[0].nbest) == 1


def test_a_beam_of_1_is_greedy(workspace, model):
    (narrow,) = model.transcribe(workspace / "short.wav", beam=1).segments
    features = features_of(model, workspace / "short.wav")
    memory = model.loaded.model.listen(features[None], torch.tensor([len(features)]))
    ((greedy,),) = beam.greedy_search(model.loaded.model, memory, model.loaded.config.decoding)
    assert narrow.text == model.loaded.vocabulary.decode(greedy.text_tokens)
    (wide,) = model.transcribe(workspace / "short.wav", beam=8).segments
    assert wide.score > narrow.score


def features_of(model, path):
    from las_fast.data.audio import open_recording
    from las_fast.data.normalisation import model_input
    from las_fast.data.segments import segments

    config = model.loaded.config.features
    (speech,) = segments(open_recording(path, config.sample_rate), config)
    return model_input(speech.frames, config)


def test_the_language_model_can_be_the_checkpoints_another_or_none(workspace, capsys):
    recogniser = las_fast.load(workspace / "lm" / "untrained-20.safetensors", device="cpu")
    row, _ = output_of_the_command(capsys, workspace / "lm" / "untrained-20.safetensors", workspace / "short.wav")
    models = {"own": None, "none": False, "other": workspace / "other.lm.safetensors"}
    texts = {name: recogniser.transcribe(workspace / "short.wav", lm=lm).text for name, lm in models.items()}
    assert texts["own"] == row["text"] and len(set(texts.values())) == 3
    bare = las_fast.load(workspace / "untrained-20.safetensors", device="cpu")
    assert texts["none"] == bare.transcribe(workspace / "short.wav", beam=3).text
    row, _ = output_of_the_command(
        capsys,
        workspace / "lm" / "untrained-20.safetensors",
        workspace / "short.wav",
        "--lm",
        str(workspace / "other.lm.safetensors"),
    )
    assert texts["other"] == row["text"]
    assert recogniser.transcribe(workspace / "short.wav").text == texts["own"]  # after another language model was used


def test_a_second_call_reuses_the_ngram_model_and_the_packed_weights(workspace, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(ngram.LanguageModel, "automaton", counted(ngram.LanguageModel.automaton, made, "model"))
    monkeypatch.setattr(beam, "speller_pack", counted(beam.speller_pack, made, "weights"))
    for name in ("untrained-20.safetensors", "untrained-20.lm.safetensors"):
        (tmp_path / name).write_bytes((workspace / "lm" / name).read_bytes())
    recogniser = las_fast.load(tmp_path / "untrained-20.safetensors", device="cpu")
    first = recogniser.transcribe(workspace / "short.wav")
    once = list(made)
    assert once.count("model") == 1 and once.count("weights") <= 1  # 0 without the C++ search
    assert (
        recogniser.transcribe(workspace / "short.wav", lm=False) != first
        and recogniser.transcribe(workspace / "short.wav", beam=2).text
    )
    assert recogniser.transcribe(workspace / "short.wav") == first and made == once
    ngram.save_lm(tmp_path / "untrained-20.lm.safetensors", lm.train(["ZZ ZZ ZZZZ", "Z"], order=2))
    assert recogniser.transcribe(workspace / "short.wav").text != first.text and made == [*once, "model"]


def counted(function, made, name):
    def call(*arguments, **options):
        made.append(name)
        return function(*arguments, **options)

    return call


def test_threads_may_share_a_model(workspace):
    recogniser = las_fast.load(workspace / "lm" / "untrained-20.safetensors", device="cpu")
    jobs = [(name, value) for name in ("short.wav", "stereo.wav") for value in (None, False)] * 3
    with ThreadPoolExecutor(4) as pool:
        concurrent = list(pool.map(lambda job: recogniser.transcribe(workspace / job[0], lm=job[1]), jobs))
    assert concurrent == [recogniser.transcribe(workspace / name, lm=value) for name, value in jobs]


def test_noise_segments_are_left_out_with_a_warning(workspace, tmp_path):
    path = make_checkpoint(tmp_path, 20, mel_bins=23, sections={"model": replace(MODEL, ctc_layer=0)})
    scored = las_fast.load(path, device="cpu")
    everything = scored.transcribe(workspace / "short.wav", min_speech_score=-np.inf)
    (segment,) = everything.segments
    assert segment.speech_score is not None and not everything.noise
    options = {"min_speech_score": segment.speech_score + 1}
    nothing, messages = call_with_warnings(scored.transcribe, workspace / "short.wav", **options)
    assert nothing.text == "" and nothing.noise == everything.segments and "1 left out" in repr(nothing)
    assert messages == [
        f"{workspace / 'short.wav'}: left out 1 segment that may be noise, the first at {segment.start:.1f} s "
        f"(speech score {segment.speech_score:.2f}); min_speech_score sets the limit"
    ]


@pytest.mark.parametrize("make", [lambda path: path.write_text("{}"), Path.mkdir, lambda path: path.symlink_to("gone")])
def test_a_damaged_calibration_is_an_error_before_the_work(workspace, tmp_path, make):
    shutil.copy(workspace / "untrained-20.safetensors", tmp_path / "mine.safetensors")
    make(tmp_path / "mine.words.json")
    model = las_fast.load(tmp_path / "mine.safetensors", device="cpu")
    for work in (model.transcription, lambda: model.decode(np.zeros((9, 23), np.float32))):
        with pytest.raises(InputError, match="mine.words.json (is not a calibration|cannot be read)"):
            work()


def test_a_transcript_has_the_warnings_about_its_recording(workspace, model, tmp_path):
    whole = (workspace / "short.wav").read_bytes()
    (tmp_path / "half.wav").write_bytes(whole[: len(whole) // 2])
    transcript, messages = call_with_warnings(model.transcribe, tmp_path / "half.wav")
    assert transcript.warnings == tuple(messages) and "half.wav is cut off" in messages[0]


def test_many_recordings_are_decoded_together_and_come_in_order(workspace, model):
    array = soundfile.read(workspace / "short.wav", dtype="float32")[0]
    recordings = [workspace / "short.wav", workspace / "long.wav", workspace / "stereo.wav"]
    actual = dict(model.transcribe_all(recordings, beam=2))
    assert list(actual) == recordings
    for recording, transcript in actual.items():
        assert_equal_up_to_rounding(transcript, model.transcribe(recording, beam=2))
    again = [transcript for _, transcript in model.transcribe_all([array, array], RATE, beam=2)]
    assert_equal_up_to_rounding(again, [actual[recordings[0]]] * 2)


def test_an_unreadable_recording_raises_or_is_left_out(workspace, model):
    recordings = [workspace / "short.wav", workspace / "gone.wav", workspace / "stereo.wav"]
    actual = model.transcribe_all(recordings, beam=1)
    assert next(actual)[0] == recordings[0]
    with pytest.raises(InputError, match="gone.wav does not exist"):
        next(actual)
    messages = []
    left = model.transcribe_all(recordings, beam=1, skip_bad=True, warn=messages.append)
    assert [x for x, _ in left] == recordings[::2] and messages == [f"left out: {recordings[1]} does not exist"]


def test_a_model_trained_on_archive_features_warns_about_recordings(workspace, tmp_path):
    path = make_checkpoint(tmp_path, 20, mel_bins=23, info={"data": {"kind": "features", "name": "HW4P2 F23"}})
    _, messages = call_with_warnings(las_fast.load(path, device="cpu").transcribe, workspace / "short.wav", beam=1)
    assert (
        len(messages) == 1 and "was trained on the features of HW4P2 F23; those that las_fast computes" in messages[0]
    )


@pytest.mark.parametrize("number", [np.float32(-2.5), np.int64(-2), -2])
def test_a_speech_score_may_be_any_kind_of_number(workspace, model, number):
    plain = model.transcribe(workspace / "short.wav", beam=1)
    assert model.transcribe(workspace / "short.wav", beam=1, min_speech_score=number) == plain


@pytest.mark.parametrize(
    ("recordings", "options", "message"),
    [
        ("short.wav", {}, "a list of paths, files or arrays; got a value of type str; for a single recording, call tr"),
        (None, {}, "recordings must be a list of paths, files or arrays; got None"),
        (3, {}, "recordings must be a list of paths, files or arrays; got a value of type int"),
        ([], {"pool_seconds": float("nan")}, "pool_seconds must be a number of at least 0; got nan"),
        ([], {"pool_seconds": -1}, "pool_seconds must be a number of at least 0; got -1"),
        ([], {"pool_seconds": "9"}, "pool_seconds must be a number of at least 0; got '9'"),
        ([], {"min_speech_score": None}, "min_speech_score must be a number; got None"),
    ],
)
def test_invalid_lists_and_limits_are_a_one_sentence_error(model, recordings, options, message):
    with pytest.raises(InputError, match=message):
        model.transcribe_all(recordings, **options)


def test_an_unknown_option_is_named(model):
    with pytest.raises(TypeError, match="unexpected keyword argument 'bean'"):
        model.transcribe(SPEECH, RATE, bean=3)


@pytest.fixture(scope="module")
def archive(workspace):
    """The dev split as the decode command reads it, and its feature arrays."""
    argv = ["--data", str(workspace / "11-785-f23-hw4p2"), "--split", "dev-clean", "--out", str(workspace / "out.csv")]
    argv += ["--jsonl", str(workspace / "rows.jsonl"), "--nbest", "2", "--beam", "4", "--device", "cpu"]
    decode.main(["--checkpoint", str(workspace / "untrained-28.safetensors"), *argv])
    rows = [json.loads(line) for line in (workspace / "rows.jsonl").read_text().splitlines()]
    folder = workspace / "11-785-f23-hw4p2" / "dev-clean" / "mfcc"
    return rows, [np.load(folder / f"{row['id']}.npy") for row in rows]


def test_features_give_the_texts_of_the_decode_command(workspace, archive):
    rows, arrays = archive
    recogniser = las_fast.load(workspace / "untrained-28.safetensors", device="cpu")
    actual = recogniser.decode(arrays, beam=4, nbest=2)
    found = [
        [{"text": h.text, "score": round(h.score, 4), "words": [word_row(w) for w in h.words]} for h in each]
        for each in actual
    ]
    assert found == [r["nbest"] for r in rows]
    assert {type(h) for each in actual for h in each} == {las_fast.Hypothesis} and len(actual[0]) == 2
    alone = recogniser.decode(torch.from_numpy(arrays[1]), beam=4)
    assert [h.text for h in alone] == [rows[1]["text"]] and alone[0].score == pytest.approx(
        actual[1][0].score, abs=1e-4
    )
    assert recogniser.decode([]) == []


def test_durations_of_features_count_whole_samples_per_frame(tmp_path, monkeypatch):
    recogniser_28 = las_fast.load(make_checkpoint(tmp_path, 20, mel_bins=23, sample_rate=22_050), device="cpu")
    datasets = []
    decode_dataset = dataset.decode_dataset
    monkeypatch.setattr(dataset, "decode_dataset", lambda *x, **y: datasets.append(x[1]) or decode_dataset(*x, **y))
    recogniser_28.decode([np.ones((frames, 20)) for frames in (57, 30)], beam=1)
    assert datasets[0].seconds.tolist() == [57 * 220 / 22_050, 30 * 220 / 22_050]  # 220 samples per frame


F28 = np.ones((30, 28), np.float32)


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        (F28.T, {}, r"features must have shape \(T, 28\), as in training; got \(28, 30\); transpose it"),
        (np.ones((30, 13)), {}, r"features must have shape \(T, 28\), as in training; got \(30, 13\)$"),
        (F28[0], {}, r"features must have shape \(T, 28\), as in training; got \(28,\)"),
        (F28[None], {}, r"features must have shape \(T, 28\), as in training; got \(1, 30, 28\)"),
        (F28[:0], {}, r"features must have shape \(T, 28\), as in training; got \(0, 28\)"),
        ([F28, F28 * np.nan], {}, r"features\[1\] contains NaN or infinite values"),
        (F28.astype("f8") * 1e300, {}, "features contains NaN or infinite values"),
        (F28 > 0, {}, "features must contain numbers; got an array of bool"),
        ([F28, [1.0]], {}, r"features\[1\] must be an array of shape \(T, 28\); got a value of type list"),
        ("dev.npy", {}, r"features must be an array of shape \(T, 28\); got a value of type str"),
        (F28, {"beam": 0}, "decoding.beam must be at least 1"),
        (F28, {"nbest": 9}, "nbest=9 needs a beam of at least 9; give beam=9"),
    ],
)
def test_invalid_features_are_a_one_sentence_error(workspace, features, options, message):
    recogniser = las_fast.load(workspace / "untrained-28.safetensors", device="cpu")
    with pytest.raises(InputError, match=message):
        recogniser.decode(features, **options)


def test_greedy_search_has_confidences_of_its_own(tmp_path):
    path = make_checkpoint(tmp_path, 20, mel_bins=23)
    Calibration(LogisticRegression(1.0, {}, {}), LogisticRegression(-2.0, {}, {})).save(calibration_path_for(path))
    model = las_fast.load(path, device="cpu")
    for width, total in ((1, -2.0), (2, 1.0)):
        words = model.transcribe(make_speech(0.6), sample_rate=RATE, beam=width).words
        expected = [1 / (1 + np.exp(-total))] * len(words)
        assert words and [word.confidence for word in words] == pytest.approx(expected, abs=1e-3)
