"""The spoken corpus: its plan, its files, and its reproducibility."""

import contextlib
import ctypes
import hashlib
import inspect
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import astuple

import numpy as np
import pytest
import torch
from fakes import raising

from las_fast import progress
from las_fast.config import FeatureConfig
from las_fast.data import espeak, sentences, spoken
from las_fast.data.features import compute_features
from las_fast.errors import InputError
from las_fast.options import Parser
from las_fast.text import Vocabulary

SIZES = {"train": 24, "dev": 5, "test": 6, "seed": 3}
NO_SETTINGS = ("{}", "no json", "[]", "3", '{"settings": {"train": 1}}', '{"settings": "espeakng_loader"}')


@pytest.fixture(scope="module")
def plan():
    return spoken.plan(train=2400, dev=120, test=200, seed=1)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    pytest.importorskip("espeakng_loader", reason="eSpeak NG is not installed")
    root = tmp_path_factory.mktemp("spoken") / "corpus"
    spoken.generate(root, **SIZES, workers=1, progress=False)
    return root


def role(utterance):
    return utterance.split.partition("-")[0]


def of(plan, name):
    return [u for u in plan if role(u) == name]


def test_voices_of_dev_and_test_are_never_in_training(plan):
    speakers = {name: {u.voice.partition("+")[2] for u in of(plan, name)} for name in ("train", "dev", "test")}
    assert not speakers["train"] & speakers["test"]
    assert not speakers["train"] & speakers["dev"]
    assert not speakers["dev"] & speakers["test"]
    assert len({u.voice for u in of(plan, "train")}) >= 12


def test_sentences_of_dev_and_test_are_never_in_training(plan):
    texts = {name: {u.text for u in of(plan, name)} for name in ("train", "dev", "test")}
    assert not texts["train"] & (texts["dev"] | texts["test"])
    assert not texts["dev"] & texts["test"]
    assert len(texts["test"]) == 200 and len(texts["dev"]) == 120


def test_splits_share_no_sentence_for_any_seed():
    train = {u.text for u in of(spoken.plan(train=3000, dev=1, test=1, seed=5), "train")}
    test = {u.text for u in of(spoken.plan(train=1, dev=1, test=300, seed=6), "test")}
    assert not train & test


def test_every_test_word_occurs_in_training(plan):
    words = {name: {w for u in of(plan, name) for w in u.text.split()} for name in ("train", "test")}
    assert words["test"] <= words["train"]
    assert 200 <= len(words["train"]) <= 400


def test_sentences_are_short_and_need_no_other_character(plan):
    vocabulary = Vocabulary()
    for utterance in plan:
        assert not vocabulary.unknown(utterance.text)
        assert 6 <= len(utterance.text) <= 40
        assert utterance.text == " ".join(utterance.text.split())
    assert set("".join(u.text for u in plan)) == set(vocabulary.characters)


@pytest.mark.parametrize(
    "number, words",
    [(0, "ZERO"), (13, "THIRTEEN"), (20, "TWENTY"), (47, "FORTY SEVEN"), (300, "THREE HUNDRED"),
     (612, "SIX HUNDRED AND TWELVE"), (999, "NINE HUNDRED AND NINETY NINE")],
)  # fmt: skip
def test_numbers_are_spelled_as_words(number, words):
    assert sentences.number_in_words(number) == words


@pytest.mark.parametrize(
    "number, words",
    [(1, "FIRST"), (12, "TWELFTH"), (20, "TWENTIETH"), (21, "TWENTY FIRST"), (30, "THIRTIETH"), (31, "THIRTY FIRST")],
)
def test_ordinals_are_spelled_as_words(number, words):
    assert sentences.ordinal_in_words(number) == words


def test_the_corpus_of_a_seed_is_the_same_in_every_version():
    """The demo quotes scores on this corpus."""
    plan = spoken.plan(train=400, dev=60, test=60, seed=1)
    lines = [repr(astuple(utterance)) for utterance in plan]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == "d81f4ae80e31ae0e"


class Tone:
    """Synthesises the same tone for any text."""

    sample_rate = 22050

    def __init__(self):
        self.asked = []

    def speak(self, text, voice, *, rate, pitch, pitch_range):
        self.asked.append((text, voice, rate, pitch, pitch_range))
        return np.sin(np.arange(4410) / 9).astype(np.float32)


def test_a_recording_of_a_seed_has_its_own_voice_pace_volume_and_silences():
    tone, plan = Tone(), spoken.plan(train=400, dev=60, test=60, seed=1)
    waves = [spoken.synthesise(tone, plan[n], seed=3) for n in (0, 450)]
    assert [words[2:] for words in tone.asked] == [(184, 57, 63), (188, 38, 62)]
    assert [words[:2] for words in tone.asked] == [(plan[n].text, plan[n].voice) for n in (0, 450)]
    assert [len(wave) for wave in waves] == [5351, 8916]
    assert [np.abs(wave).max() for wave in waves] == pytest.approx([0.23416, 0.11658], abs=2e-5)
    assert [wave.std() for wave in waves] == pytest.approx([0.12769, 0.04873], abs=2e-5)
    assert [wave[:50].std() for wave in waves] == pytest.approx([0.000255, 0.000649], rel=1e-2)
    assert waves[0].dtype == np.float32


class Quiet(Tone):
    """Synthesises a tone of a given peak."""

    def __init__(self, peak):
        super().__init__()
        self.peak = peak

    def speak(self, *words, **settings):
        return super().speak(*words, **settings) * np.float32(self.peak)


def test_a_nearly_silent_recording_is_not_amplified():
    utterance = spoken.PlannedUtterance("dev-clean", "x", "TEN", "en+m1", 0)
    loud, half, none = (spoken.synthesise(Quiet(peak), utterance, seed=1) for peak in (1.0, 5e-4, 0.0))
    assert np.abs(half).max() == pytest.approx(np.abs(loud).max() / 2, rel=0.05)
    assert np.isfinite(none).all() and 0 < np.abs(none).max() < 0.02


# ---------------------------------------------------------------------------------------------------- eSpeak NG itself


class Library:
    """Fake of the eSpeak NG library: records calls and synthesises two chunks of samples."""

    _handle = 7

    def __init__(self, rate=22050):
        self.rate, self.calls, self.answers, self.chunks = rate, [], [], ([16384, -32768], [8192])
        self.unknown_voice = 0

    def espeak_Initialize(self, *words):  # noqa: N802
        self.calls.append(("initialise", *words))
        return self.rate

    def espeak_SetSynthCallback(self, callback):  # noqa: N802
        self.callback = callback

    def espeak_ng_SetRandSeed(self, seed):  # noqa: N802
        self.calls.append(("seed", seed.value))

    def espeak_SetVoiceByName(self, name):  # noqa: N802
        self.calls.append(("voice", name))
        return self.unknown_voice

    def espeak_SetParameter(self, *words):  # noqa: N802
        self.calls.append(("set", *words))

    def espeak_Synth(self, text, size, *words):  # noqa: N802
        self.calls.append(("say", text, size.value, *words))
        for chunk in self.chunks:
            self.answers.append(self.callback((ctypes.c_short * len(chunk))(*chunk), len(chunk), None))
        some = (ctypes.c_short * 1)(99)
        self.answers += [self.callback(None, 0, None), self.callback(some, 0, None)]

    def espeak_Terminate(self):  # noqa: N802
        self.calls.append(("end",))


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Replace eSpeak NG by a Library with data in tmp_path."""
    library = Library()
    (tmp_path / "voices" / "!v").mkdir(parents=True)
    for name in ("phontab", "voices/!v/m1"):
        (tmp_path / name).touch()
    loader = type("Loader", (), {"get_library_path": lambda: "lib.so", "get_data_path": lambda: str(tmp_path)})
    monkeypatch.setattr(espeak, "load_espeak", lambda: loader)
    monkeypatch.setattr(espeak.ctypes, "CDLL", {"lib.so": library}.__getitem__)
    monkeypatch.setattr(espeak._ctypes, "dlclose", lambda handle: library.calls.append(("unload", handle)))
    return library


def test_espeak_gets_the_text_and_the_voice_settings(library, tmp_path):
    synthesiser = espeak.Synthesiser()
    assert library.calls == [("initialise", 2, 0, str(tmp_path).encode(), 0), ("seed", 1)]
    assert synthesiser.sample_rate == 22050
    library.calls.clear()
    for _ in range(2):  # the second call keeps nothing of the first
        wave = synthesiser.speak("US", "en-us+m1", rate=170, pitch=40, pitch_range=60)
        assert wave.dtype == np.float32 and wave.tolist() == [0.5, -1.0, 0.25]
    set_all = [("set", 1, 170, 0), ("set", 3, 40, 0), ("set", 4, 60, 0)]  # espeakRATE, espeakPITCH, espeakRANGE
    say = ("say", b"us", 3, 0, 0, 0, 1, None, None)  # with its final NUL; no position; UTF-8
    assert library.calls == 2 * [("voice", b"en-us+m1"), *set_all, say]
    assert set(library.answers) == {0} and synthesiser._collect(None, 3, None) == 0  # 1 would end the speech
    for _ in range(2):  # the second call does nothing
        synthesiser.close()
    assert library.calls[-3:] == [say, ("end",), ("unload", 7)]


def test_an_error_of_espeak_is_an_input_error(library, tmp_path):
    how = {"rate": 170, "pitch": 50, "pitch_range": 50}
    with espeak.Synthesiser() as synthesiser:
        with pytest.raises(InputError, match=r"lacks the eSpeak NG voice en\+m2"):
            synthesiser.speak("TEN", "en+m2", **how)
        library.unknown_voice = 1
        with pytest.raises(InputError, match=r"lacks the eSpeak NG voice xx\+m1"):
            synthesiser.speak("TEN", "xx+m1", **how)
        library.unknown_voice, library.chunks = 0, ()
        with pytest.raises(InputError, match="produced no sound for 'TEN' in voice en"):
            synthesiser.speak("TEN", "en+m1", **how)
    for library.rate in (0, -1):
        with pytest.raises(InputError, match="cannot use the data there"):
            espeak.Synthesiser()
    (tmp_path / "phontab").unlink()
    with pytest.raises(InputError, match="has no eSpeak NG data"):
        espeak.Synthesiser()
    assert library.calls[-2:] == [("end",), ("unload", 7)]


def test_only_one_synthesiser_is_open_at_a_time(library):
    message = "another Synthesiser is open in this process; close it first"
    with espeak.Synthesiser(), pytest.raises(RuntimeError, match=message):
        espeak.Synthesiser()
    espeak.Synthesiser().close()


def test_only_paths_of_120_bytes_and_more_need_a_link(library, tmp_path):
    synthesiser = espeak.Synthesiser()
    for length in (119, 120):
        path = tmp_path / ("x" * (length - len(str(tmp_path)) - 1))
        actual = synthesiser._short_path(path)
        assert (actual == path) == (length == 119)
    assert actual.readlink() == path and actual.parent.name.startswith("espeak")
    synthesiser.close()
    assert not actual.is_symlink()


def test_a_library_that_does_not_load_is_an_input_error(library, monkeypatch):
    def fails(path):
        raise OSError("wrong machine")

    monkeypatch.setattr(espeak.ctypes, "CDLL", fails)
    with pytest.raises(InputError, match=r"eSpeak NG does not load \(wrong machine\)"):
        espeak.Synthesiser()


# ------------------------------------------------------------------------------------------------------- output files


def test_the_corpus_has_the_f23_layout(root):
    archive = root / "11-785-f23-hw4p2"
    counts = {}
    for split in ("train-clean-100", "train-clean-360", "dev-clean", "test-clean"):
        features = sorted(p.name for p in (archive / split / "mfcc").glob("*.npy"))
        counts[split] = len(features)
        if split == "test-clean":
            assert not (archive / split / "transcripts").exists()
        else:
            assert features == sorted(p.name for p in (archive / split / "transcripts").glob("*.npy"))
    assert counts == {"train-clean-100": 5, "train-clean-360": 19, "dev-clean": 5, "test-clean": 6}


def test_features_are_finite_mfcc_of_one_to_four_seconds(root):
    for path in root.rglob("mfcc/*.npy"):
        features = np.load(path)
        assert features.dtype == np.float32 and features.shape[1] == 28
        assert 60 < len(features) < 450
        assert np.isfinite(features).all() and (features.std(0) > 0).all()


def test_transcripts_are_characters_between_sos_and_eos(root):
    planned = {u.name: u.text for u in spoken.plan(**SIZES)}
    for path in root.rglob("transcripts/*.npy"):
        symbols = np.load(path)
        assert symbols.dtype == np.dtype("<U5")
        assert symbols[0] == "<sos>" and symbols[-1] == "<eos>"
        assert "".join(symbols[1:-1]) == planned[path.stem]


def test_test_transcripts_are_kept_beside_the_archive(root):
    texts = spoken.read_test_transcripts(root)
    assert sorted(texts) == sorted(p.stem for p in (root / spoken.ARCHIVE / "test-clean" / "mfcc").glob("*.npy"))
    planned = {u.name: u.text for u in spoken.plan(**SIZES)}
    for name, (text, seconds) in texts.items():
        assert text == planned[name]
        frames = len(np.load(root / spoken.ARCHIVE / "test-clean" / "mfcc" / f"{name}.npy"))
        assert frames == pytest.approx(seconds * 100, abs=3)


def test_the_number_of_processes_does_not_change_the_corpus(tmp_path, monkeypatch):
    pytest.importorskip("espeakng_loader", reason="eSpeak NG is not installed")
    monkeypatch.setattr(spoken, "BLOCK_SIZE", 8)
    for workers in (1, 2):
        spoken.generate(tmp_path / str(workers), **SIZES, workers=workers, progress=False)
    one, two = (sorted(p for p in (tmp_path / n).rglob("*") if p.is_file()) for n in "12")
    assert [p.relative_to(tmp_path / "1") for p in one] == [p.relative_to(tmp_path / "2") for p in two]
    assert len(one) == 24 + 24 + 5 + 5 + 6 + 2
    for a, b in zip(one, two, strict=True):
        assert a.read_bytes() == b.read_bytes(), a


def test_a_complete_corpus_is_recognised_by_its_settings(root, tmp_path):
    assert spoken.is_current(root, **SIZES)
    assert not spoken.is_current(root, **{**SIZES, "train": 25})
    assert not spoken.is_current(tmp_path, **SIZES)


@pytest.fixture
def synthesiser():
    pytest.importorskip("espeakng_loader", reason="eSpeak NG is not installed")
    with espeak.Synthesiser() as synthesiser:
        yield synthesiser


def test_every_voice_exists_and_is_audible(synthesiser):
    for speakers in spoken.SPEAKERS.values():
        for i, speaker in enumerate(speakers):
            voice = f"{espeak.ACCENTS[i % len(espeak.ACCENTS)]}+{speaker}"
            wave = synthesiser.speak("TEN PAST TWO", voice, rate=170, pitch=50, pitch_range=50)
            assert 0.5 < len(wave) / synthesiser.sample_rate < 3, voice
            assert 0.05 < np.abs(wave).max() <= 1, voice


def test_recordings_differ_in_volume_noise_and_silence(synthesiser):
    waves = [
        spoken.synthesise(synthesiser, spoken.PlannedUtterance("dev-clean", "x", "TEN PAST TWO", "en-us+m1", i), seed=1)
        for i in range(4)
    ]
    assert len({len(w) for w in waves}) == 4
    assert len({round(float(np.abs(w).max()), 4) for w in waves}) == 4
    for wave in waves:
        assert wave.dtype == np.float32 and np.abs(wave).max() < 0.5
        assert (wave != 0).mean() > 0.999  # noise in every sample


def test_an_unknown_voice_is_refused_rather_than_replaced(synthesiser):
    for voice in ("en-us+nobody", "xx-none+m1"):
        with pytest.raises(InputError, match="lacks the eSpeak NG voice"):
            synthesiser.speak("TEN", voice, rate=170, pitch=50, pitch_range=50)


def test_speech_does_not_depend_on_an_earlier_synthesiser():
    pytest.importorskip("espeakng_loader", reason="eSpeak NG is not installed")
    waves = []
    for other in ("en+m7", "en-us+klatt2"):
        with espeak.Synthesiser() as synthesiser:
            waves.append(synthesiser.speak("TEN PAST TWO", "en-us+f2", rate=170, pitch=50, pitch_range=50))
            synthesiser.speak("A BLACK DOG", other, rate=300, pitch=80, pitch_range=20)
    np.testing.assert_array_equal(*waves)


def test_a_deep_installation_is_reached_through_a_link(tmp_path, monkeypatch):
    loader = pytest.importorskip("espeakng_loader", reason="eSpeak NG is not installed")
    long_path = tmp_path / ("d" * 100) / ("e" * 100)
    long_path.mkdir(parents=True)
    (long_path / "espeak-ng-data").symlink_to(loader.get_data_path())
    monkeypatch.setattr(loader, "get_data_path", lambda: str(long_path / "espeak-ng-data"))
    with espeak.Synthesiser() as synthesiser:
        link = synthesiser._data
        assert len(str(link)) < 160
        assert len(synthesiser.speak("TEN", "en-us+m1", rate=170, pitch=50, pitch_range=50)) > 1000
    assert not link.exists()


def test_missing_espeak_data_is_an_error_before_espeak_would_exit_the_process(tmp_path, monkeypatch):
    loader = pytest.importorskip("espeakng_loader", reason="eSpeak NG is not installed")
    monkeypatch.setattr(loader, "get_data_path", lambda: str(tmp_path))
    with pytest.raises(InputError, match="reinstall espeakng-loader"):
        espeak.Synthesiser()


def test_a_block_is_written_as_planned(tmp_path, monkeypatch):
    closed, threads = [], []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(spoken, "Synthesiser", lambda: contextlib.closing(Tone()))
    monkeypatch.setattr(Tone, "close", lambda self: closed.append(self), raising=False)
    utterances = [u for u in spoken.plan(**SIZES) if u.split in ("dev-clean", "test-clean")][4:6]
    for split in ("dev-clean", "test-clean"):
        (tmp_path / split / "mfcc").mkdir(parents=True)
    (tmp_path / "dev-clean" / "transcripts").mkdir()
    rows = spoken._speak_block((utterances, 3, str(tmp_path)))
    waves = [spoken.synthesise(Tone(), u, seed=3) for u in utterances]
    assert rows == [(u.name, len(wave) / 16000) for u, wave in zip(utterances, waves, strict=True)]
    f23 = FeatureConfig(kind="mfcc", size=28, mel_bins=40, normalisation="none")
    assert f23 == spoken.FEATURES and len(closed) == 1 and threads == [1]
    for u, frames in zip(utterances, compute_features(waves, f23), strict=True):
        stored = np.load(tmp_path / u.split / "mfcc" / f"{u.name}.npy")
        assert stored.dtype == np.float32
        np.testing.assert_allclose(stored, frames, atol=1e-5)
    symbols = np.load(tmp_path / "dev-clean" / "transcripts" / f"{utterances[0].name}.npy")
    assert symbols.dtype == np.dtype("<U5") and symbols.tolist() == ["<sos>", *utterances[0].text, "<eos>"]
    assert len(list(tmp_path.rglob("*.npy"))) == 3


@pytest.fixture
def speak_calls(monkeypatch):
    """Replace _speak: each utterance lasts 180 s and no file is written. Returns a list of the calls' arguments."""
    calls = []

    def speak(utterances, archive, **options):
        calls.append((utterances, archive, options))
        archive.mkdir(parents=True)
        return {u.name: 180.0 + u.number / 8 for u in utterances}

    monkeypatch.setattr(spoken, "_speak", speak)
    return calls


def test_the_tables_of_a_corpus_list_its_contents(tmp_path, speak_calls):
    pytest.importorskip("espeakng_loader", reason="eSpeak NG is not installed")
    root = tmp_path / "deep" / "corpus"
    assert spoken.generate(root, **SIZES, workers=3, progress=False) == root / "11-785-f23-hw4p2"
    ((utterances, archive, options),) = speak_calls
    assert utterances == spoken.plan(**SIZES) and options == {"seed": 3, "workers": 3, "progress": False}
    assert archive.name == "11-785-f23-hw4p2" and root.parent in archive.parents and not archive.exists()
    test = sorted((u for u in utterances if u.split == "test-clean"), key=lambda u: u.name)
    lines = [f"{u.name}\t{u.voice}\t{180 + u.number / 8:.3f}\t{u.text}" for u in test]
    assert (root / "test-clean.tsv").read_text() == "\n".join(["file\tvoice\tseconds\ttext", *lines]) + "\n"
    texts = spoken.read_test_transcripts(root)
    assert texts == {u.name: (u.text, 180 + u.number / 8) for u in test}
    made = (root / "corpus.json").read_text()
    info = json.loads(made)
    assert made == json.dumps(info, indent=1) + "\n"
    assert info["hours"] == {"train-clean-100": 0.2503, "train-clean-360": 0.9592, "dev-clean": 0.2545,
                             "test-clean": 0.3066}  # fmt: skip
    splits = ("train-clean-100", "train-clean-360", "dev-clean", "test-clean")
    assert info["voices"] == {s: len({u.voice for u in utterances if u.split == s}) for s in splits}
    assert info["settings"].keys() == {*SIZES, "code", "espeakng_loader", "features"}
    assert info["settings"]["features"] | {"kind": "mfcc", "size": 28, "mel_bins": 40} == info["settings"]["features"]


def test_a_corpus_is_current_only_for_its_own_arguments(tmp_path, speak_calls):
    pytest.importorskip("espeakng_loader", reason="eSpeak NG is not installed")
    spoken.generate(tmp_path, **SIZES)  # an empty folder is allowed
    assert spoken.is_current(tmp_path, **SIZES) is True
    for name, value in SIZES.items():
        assert spoken.is_current(tmp_path, **{**SIZES, name: value + 1}) is False, name
    spoken.generate(tmp_path, **SIZES | {"seed": 4})  # a former corpus is replaced
    assert spoken.is_current(tmp_path, **SIZES) is False
    spoken.generate(tmp_path, **SIZES)
    assert spoken.is_current(tmp_path, **SIZES)
    for text in NO_SETTINGS:
        (tmp_path / "corpus.json").write_text(text)
        assert spoken.is_current(tmp_path, **SIZES) is False


def test_command_and_function_have_the_same_defaults(tmp_path, speak_calls, capsys):
    pytest.importorskip("espeakng_loader", reason="eSpeak NG is not installed")
    parser = Parser()
    spoken.add_sizes(parser)
    expected = {"train": 2400, "dev": 120, "test": 200, "seed": 1}
    assert vars(parser.parse_args([])) == expected
    defaults = {name: p.default for name, p in inspect.signature(spoken.generate).parameters.items()}
    assert {name: defaults[name] for name in expected} == expected and defaults["progress"] is True
    spoken.main(["--out", str(tmp_path / "c"), "--train", "9", "--dev", "2", "--test", "3", "--seed", "4"])
    sizes = {"train": 9, "dev": 2, "test": 3, "seed": 4}
    assert spoken.is_current(tmp_path / "c", **sizes) and speak_calls[0][0] == spoken.plan(**sizes)
    assert speak_calls[0][2] == {"seed": 4, "workers": None, "progress": True}
    message = capsys.readouterr().out
    assert message == (f"{tmp_path}/c/11-785-f23-hw4p2: train-clean-100 3.0 minutes, train-clean-360 24.1 minutes, "
                    "dev-clean 6.0 minutes, test-clean 9.1 minutes\n")  # fmt: skip


def test_the_number_of_processes_has_limits(tmp_path, speak_calls):
    pytest.importorskip("espeakng_loader", reason="eSpeak NG is not installed")
    words = ["--out", str(tmp_path / "c"), "--train", "1", "--dev", "1", "--test", "1", "--workers"]
    for workers in (0, 257, -1):
        with pytest.raises(InputError, match=f"--workers must be from 1 to 256; got {workers}"):
            spoken.main([*words, str(workers)])
    for workers in (1, 256):
        spoken.main([*words, str(workers)])
    assert [options["workers"] for *_, options in speak_calls] == [1, 256]
    with pytest.raises(SystemExit):
        spoken.main([])


def test_a_corpus_is_synthesised_in_blocks_with_their_durations_summed(tmp_path, monkeypatch, capsys):
    def fake_map(function, tasks, workers):
        calls.append((function, tasks, workers))
        for block, *_ in tasks:
            yield [(u.name, float(u.number)) for u in block]

    calls, utterances = [], spoken.plan(train=43, dev=40, test=5, seed=1)
    monkeypatch.setattr(spoken, "_map_in_processes", fake_map)
    monkeypatch.setattr(spoken, "cores", lambda: 7)
    monkeypatch.setattr(progress, "MIN_SECONDS", 0.0)
    seconds = spoken._speak(utterances, tmp_path / "a", seed=5, workers=None, progress=True)
    assert seconds == {u.name: float(u.number) for u in utterances}
    ((function, tasks, workers),) = calls
    assert function is spoken._speak_block and workers == 7
    assert [(len(block), *rest) for block, *rest in tasks] == [(n, 5, str(tmp_path / "a")) for n in (40, 40, 8)]
    assert sum((block for block, *_ in tasks), []) == utterances
    folders = {str(path.relative_to(tmp_path / "a")) for path in (tmp_path / "a").rglob("*")}
    splits = {"train-clean-100", "train-clean-360", "dev-clean", "test-clean"}
    kept = {f"{split}/transcripts" for split in splits - {"test-clean"}}
    assert folders == splits | {f"{split}/mfcc" for split in splits} | kept
    assert "synthesising: 45% (40 of 88 utterances)" in capsys.readouterr().err
    spoken._speak(utterances, tmp_path / "b", seed=5, workers=2, progress=False)
    assert calls[1][2] == 2 and capsys.readouterr().err == ""


def test_without_espeak_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(InputError, match="pip install espeakng-loader"):
        spoken.generate(tmp_path / "corpus", **SIZES)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_other_content_is_left_unchanged(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="something other than a spoken corpus"):
        spoken.generate(tmp_path, **SIZES)
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize("text", NO_SETTINGS)
def test_a_folder_with_the_corpus_json_of_something_else_is_left_unchanged(tmp_path, text):
    (tmp_path / "corpus.json").write_text(text)
    with pytest.raises(InputError, match=r"something other than a spoken corpus \(corpus.json\); give --out a new"):
        spoken.generate(tmp_path, **SIZES)
    assert [path.read_text() for path in tmp_path.iterdir()] == [text]


def test_other_files_beside_a_corpus_are_left_unchanged(tmp_path, speak_calls, monkeypatch):
    pytest.importorskip("espeakng_loader", reason="eSpeak NG is not installed")
    spoken.generate(tmp_path, **SIZES)
    (tmp_path / ".new-killed").mkdir()  # as a killed run leaves it
    (tmp_path / "thesis.tex").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=r"something other than a spoken corpus \(thesis.tex\); give --out a new"):
        spoken.generate(tmp_path, **SIZES)
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "thesis.tex").unlink()
    write = spoken._write_tables
    monkeypatch.setattr(spoken, "_write_tables", lambda *args: (tmp_path / "thesis.tex").touch() or write(*args))
    spoken.generate(tmp_path, **SIZES)  # the file appears while it works
    names = ["11-785-f23-hw4p2", "corpus.json", "test-clean.tsv", "thesis.tex"]
    assert sorted(os.listdir(tmp_path)) == names


def test_an_earlier_corpus_is_replaced_and_a_failure_leaves_it(root, tmp_path, monkeypatch):
    import shutil

    folder = tmp_path / "mine"
    shutil.copytree(root, folder)
    monkeypatch.setattr(spoken, "_speak", raising(InputError("disk full")))
    with pytest.raises(InputError):
        spoken.generate(folder, **SIZES)
    assert spoken.is_current(folder, **SIZES)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    monkeypatch.undo()
    spoken.generate(folder, train=2, dev=1, test=1, seed=1, workers=1, progress=False)
    assert json.loads((folder / "corpus.json").read_text())["settings"]["train"] == 2


def test_a_file_in_place_of_the_corpus_is_left_unchanged(tmp_path):
    (tmp_path / "x").touch()
    with pytest.raises(InputError, match="something other than a spoken corpus"):
        spoken.generate(tmp_path / "x", **SIZES)


def test_a_new_folder_is_removed_after_a_failure(tmp_path, monkeypatch):
    pytest.importorskip("espeakng_loader", reason="eSpeak NG is not installed")
    monkeypatch.setattr(spoken, "_speak", raising(InputError("disk full")))
    with pytest.raises(InputError, match="disk full"):
        spoken.generate(tmp_path / "corpus", **SIZES)
    assert not list(tmp_path.iterdir())


def test_a_corpus_is_written_into_the_current_folder_and_through_a_link(tmp_path, speak_calls, monkeypatch):
    pytest.importorskip("espeakng_loader", reason="eSpeak NG is not installed")
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to("here")
    monkeypatch.chdir(tmp_path / "here")
    for root in (".", "../link"):
        spoken.generate(root, **SIZES)
        assert sorted(os.listdir(".")) == ["11-785-f23-hw4p2", "corpus.json", "test-clean.tsv"]
    assert (tmp_path / "link").is_symlink() and spoken.is_current(".", **SIZES)


@pytest.mark.parametrize("name", ["train", "dev", "test"])
def test_sizes_range_from_1_to_99999(tmp_path, monkeypatch, name):
    def reached(**sizes):
        raise LookupError(sizes[name])

    monkeypatch.setattr(spoken, "settings", reached)
    for size in (0, 100_000):
        with pytest.raises(InputError, match=f"--{name} must be from 1 to 99999 utterances; got {size}"):
            spoken.generate(tmp_path / "corpus", **{name: size})
    for size in (1, 99_999):
        with pytest.raises(LookupError, match=str(size)):
            spoken.generate(tmp_path / "corpus", **{name: size})


def test_the_command_makes_a_corpus_and_prints_only_how_long_it_is(tmp_path):
    pytest.importorskip("espeakng_loader", reason="eSpeak NG is not installed")
    sizes = ["--train", "2", "--dev", "1", "--test", "1", "--workers", "1"]
    command = [sys.executable, "-m", "las_fast.data.spoken", "--out", str(tmp_path / "c"), *sizes]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "test-clean 0." in done.stdout and len(done.stdout.splitlines()) == 1
    assert "arning" not in done.stderr


def test_missing_test_transcripts_are_an_input_error(tmp_path):
    with pytest.raises(InputError, match="test-clean.tsv is missing"):
        spoken.read_test_transcripts(tmp_path)


def die(task):
    if task == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return task


def sleep(task):
    time.sleep(60)


def test_a_process_that_dies_is_detected_at_once():
    actual = spoken._map_in_processes(die, [0, 1, 2, 3], 1)
    assert [next(actual), next(actual)] == [0, 1]
    with pytest.raises(InputError, match=r"a speech process ended early \(exit status -9\)"):
        next(actual)


def test_a_process_that_hangs_is_abandoned(monkeypatch):
    monkeypatch.setattr(spoken, "TIMEOUT", 0.2)
    with pytest.raises(InputError, match="sent nothing for 0 s"):
        list(spoken._map_in_processes(sleep, [0, 1], 2))


def test_the_number_of_processes_is_limited_and_none_is_left(monkeypatch):
    class Process:
        def __init__(self):
            self.did = []
            started.append(self)

        def join(self):
            self.did.append("join")

        def kill(self):
            self.did.append("kill")

    def start(context, function, task):
        ours, theirs = multiprocessing.Pipe()
        pipes.append(ours)
        theirs.send(function(task))
        return ours, Process()

    started, pipes = [], []
    monkeypatch.setattr(spoken, "_start", start)
    actual = spoken._map_in_processes(str, range(7), 3)
    next(actual)
    assert len(started) == 3
    next(actual)
    assert 3 <= len(started) <= 4
    actual.close()
    answered = [process for process in started if process.did == ["join"]]
    assert len(answered) == 2 and all(process.did == ["kill", "join"] for process in started if process not in answered)
    assert sum(pipe.closed for pipe in pipes) == 2


@pytest.mark.parametrize("ignored", [False, True])
def test_deferred_signals_arrive_once_or_stay_ignored(ignored):
    delivered = []
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN if ignored else lambda *_: delivered.append(len(delivered)))
    try:
        handler = signal.getsignal(signal.SIGUSR1)
        with spoken._defer_signals(signal.SIGUSR1):
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGUSR1)
            assert delivered == []
        assert delivered == ([] if ignored else [0]) and signal.getsignal(signal.SIGUSR1) == handler
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_process_sends_the_result_of_its_task():
    ours, theirs = multiprocessing.Pipe(duplex=False)
    spoken._send(theirs, str, 5)
    assert ours.recv() == "5"


def test_every_task_is_answered_once():
    assert sorted(spoken._map_in_processes(str, range(7), 3)) == list("0123456")


def test_speech_processes_inherit_ignored_signals():
    before = signal.getsignal(signal.SIGINT)
    with spoken._ignore_signals(signal.SIGINT, signal.SIGHUP):
        child = subprocess.run([sys.executable, "-c", "import signal; print(repr(signal.getsignal(signal.SIGINT)))"],
                               capture_output=True, text=True)  # fmt: skip
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and "SIG_IGN" in child.stdout
    assert signal.getsignal(signal.SIGINT) is before


def ignores(task):
    return [signal.getsignal(number) == signal.SIG_IGN for number in (signal.SIGINT, signal.SIGHUP)]


def test_speech_processes_leave_interrupts_to_their_parent():
    assert list(spoken._map_in_processes(ignores, [0], 1)) == [[True, True]]


def test_a_signal_during_a_start_arrives_after_registration(monkeypatch):
    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        pipe, process = start(*arguments)
        actual.append(process)
        return pipe, process

    actual, start = [], spoken._start
    monkeypatch.setattr(spoken, "_start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(spoken._map_in_processes(sleep, [0], 1))
    assert actual[0].exitcode == -signal.SIGKILL
