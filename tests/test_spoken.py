"""The spoken corpus: who says what, what lands on disk, and that it can be made again."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from las_fast.data import spoken
from las_fast.errors import InputError
from las_fast.text import Vocabulary

SIZES = {"train": 24, "dev": 5, "test": 6, "seed": 3}


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


def test_sentences_stay_apart_whatever_the_seed():
    train = {u.text for u in of(spoken.plan(train=3000, dev=1, test=1, seed=5), "train")}
    test = {u.text for u in of(spoken.plan(train=1, dev=1, test=300, seed=6), "test")}
    assert not train & test


def test_every_test_word_is_heard_in_training(plan):
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
def test_numbers_are_said_in_words(number, words):
    assert spoken.say_number(number) == words


@pytest.mark.parametrize(
    "number, words",
    [(1, "FIRST"), (12, "TWELFTH"), (20, "TWENTIETH"), (21, "TWENTY FIRST"), (30, "THIRTIETH"), (31, "THIRTY FIRST")],
)
def test_ordinals_are_said_in_words(number, words):
    assert spoken.say_ordinal(number) == words


def test_the_corpus_of_a_seed_is_the_same_in_every_version():
    """Scores of the demo are told for it."""
    plan = spoken.plan(train=400, dev=60, test=60, seed=1)
    assert hashlib.sha256("\n".join(map(repr, plan)).encode()).hexdigest()[:16] == "e2a52861d7e172c2"


class Tone:
    """Says the same tone whatever it is asked to say."""

    sample_rate = 22050

    def __init__(self):
        self.asked = []

    def speak(self, text, voice, *, rate, pitch, pitch_range):
        self.asked.append((text, voice, rate, pitch, pitch_range))
        return np.sin(np.arange(4410) / 9).astype(np.float32)


def test_a_recording_of_a_seed_has_its_own_voice_pace_volume_and_silences():
    tone, plan = Tone(), spoken.plan(train=400, dev=60, test=60, seed=1)
    waves = [spoken.record(tone, plan[n], seed=3) for n in (0, 450)]
    assert [words[2:] for words in tone.asked] == [(184, 57, 63), (188, 38, 62)]
    assert [words[:2] for words in tone.asked] == [(plan[n].text, plan[n].voice) for n in (0, 450)]
    assert [len(wave) for wave in waves] == [5351, 8916]
    assert [np.abs(wave).max() for wave in waves] == pytest.approx([0.23416, 0.11658], abs=2e-5)
    assert [wave.std() for wave in waves] == pytest.approx([0.12769, 0.04873], abs=2e-5)
    assert [wave[:50].std() for wave in waves] == pytest.approx([0.000255, 0.000649], rel=1e-2)
    assert waves[0].dtype == np.float32


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


def test_the_number_of_processes_changes_nothing(tmp_path, monkeypatch):
    pytest.importorskip("espeakng_loader", reason="eSpeak NG is not installed")
    monkeypatch.setattr(spoken, "BLOCK", 8)
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


def test_every_voice_exists_and_sounds():
    pytest.importorskip("espeakng_loader", reason="eSpeak NG is not installed")
    synthesiser = spoken.Synthesiser()
    for speakers in spoken.SPEAKERS.values():
        for i, speaker in enumerate(speakers):
            voice = f"{spoken.ACCENTS[i % len(spoken.ACCENTS)]}+{speaker}"
            wave = synthesiser.speak("TEN PAST TWO", voice, rate=170, pitch=50, pitch_range=50)
            assert 0.5 < len(wave) / synthesiser.sample_rate < 3, voice
            assert 0.05 < np.abs(wave).max() <= 1, voice


def test_recordings_differ_in_volume_noise_and_silence():
    pytest.importorskip("espeakng_loader", reason="eSpeak NG is not installed")
    synthesiser = spoken.Synthesiser()
    waves = [
        spoken.record(synthesiser, spoken.Utterance("dev-clean", "x", "TEN PAST TWO", "en-us+m1", i), seed=1)
        for i in range(4)
    ]
    assert len({len(w) for w in waves}) == 4
    assert len({round(float(np.abs(w).max()), 4) for w in waves}) == 4
    for wave in waves:
        assert wave.dtype == np.float32 and np.abs(wave).max() < 0.5
        assert (wave != 0).mean() > 0.999  # noise everywhere


def test_an_unknown_voice_is_refused_rather_than_replaced():
    pytest.importorskip("espeakng_loader", reason="eSpeak NG is not installed")
    synthesiser = spoken.Synthesiser()
    for voice in ("en-us+nobody", "xx-none+m1"):
        with pytest.raises(InputError, match="lacks the eSpeak NG voice"):
            synthesiser.speak("TEN", voice, rate=170, pitch=50, pitch_range=50)


def test_a_deep_installation_is_reached_through_a_link(tmp_path, monkeypatch):
    loader = pytest.importorskip("espeakng_loader", reason="eSpeak NG is not installed")
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    (deep / "espeak-ng-data").symlink_to(loader.get_data_path())
    monkeypatch.setattr(loader, "get_data_path", lambda: str(deep / "espeak-ng-data"))
    synthesiser = spoken.Synthesiser()
    link = synthesiser._data
    assert len(str(link)) < 160
    assert len(synthesiser.speak("TEN", "en-us+m1", rate=170, pitch=50, pitch_range=50)) > 1000
    synthesiser.close()
    assert not link.exists()


def test_missing_data_is_said_before_the_library_ends_the_process(tmp_path, monkeypatch):
    loader = pytest.importorskip("espeakng_loader", reason="eSpeak NG is not installed")
    monkeypatch.setattr(loader, "get_data_path", lambda: str(tmp_path))
    with pytest.raises(InputError, match="reinstall espeakng-loader"):
        spoken.Synthesiser()


def test_a_block_is_written_as_planned(tmp_path):
    pytest.importorskip("espeakng_loader", reason="eSpeak NG is not installed")
    utterances = [u for u in spoken.plan(**SIZES) if u.split in ("dev-clean", "test-clean")][4:6]
    for split in ("dev-clean", "test-clean"):
        (tmp_path / split / "mfcc").mkdir(parents=True)
    (tmp_path / "dev-clean" / "transcripts").mkdir()
    rows = spoken._speak_block((utterances, 3, str(tmp_path)))
    assert [name for name, _ in rows] == [u.name for u in utterances]
    assert len(list(tmp_path.rglob("*.npy"))) == 3


def test_without_espeak_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(InputError, match="pip install espeakng-loader"):
        spoken.generate(tmp_path / "corpus", **SIZES)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="not a spoken corpus"):
        spoken.generate(tmp_path, **SIZES)
    assert (tmp_path / "thesis.tex").exists()


def test_an_earlier_corpus_is_replaced_and_a_failure_leaves_it(root, tmp_path, monkeypatch):
    import shutil

    mine = tmp_path / "mine"
    shutil.copytree(root, mine)
    monkeypatch.setattr(spoken, "_speak", lambda *_, **__: (_ for _ in ()).throw(InputError("disk full")))
    with pytest.raises(InputError):
        spoken.generate(mine, **SIZES)
    assert spoken.is_current(mine, **SIZES)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    monkeypatch.undo()
    spoken.generate(mine, train=2, dev=1, test=1, seed=1, workers=1, progress=False)
    assert json.loads((mine / "corpus.json").read_text())["settings"]["train"] == 2


def test_sizes_must_be_positive(tmp_path):
    with pytest.raises(InputError, match="--dev must be from 1"):
        spoken.generate(tmp_path / "corpus", dev=0)


def test_the_command_makes_a_corpus_and_says_how_long_it_is(tmp_path, capsys):
    pytest.importorskip("espeakng_loader", reason="eSpeak NG is not installed")
    spoken.main(["--out", str(tmp_path / "c"), "--train", "2", "--dev", "1", "--test", "1", "--workers", "1"])
    assert "test-clean 0." in capsys.readouterr().out


def test_missing_test_transcripts_are_an_input_error(tmp_path):
    with pytest.raises(InputError, match="test-clean.tsv is missing"):
        spoken.read_test_transcripts(tmp_path)


def die(task):
    if task == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return task


def sleep(task):
    time.sleep(60)


def test_a_process_that_dies_is_noticed_at_once():
    found = spoken._in_processes(die, [0, 1, 2, 3], 1)
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(InputError, match=r"a speaking process ended early \(exit status -9\)"):
        next(found)


def test_a_process_that_hangs_is_given_up(monkeypatch):
    monkeypatch.setattr(spoken, "SILENT", 0.2)
    with pytest.raises(InputError, match="was silent for 0 s"):
        list(spoken._in_processes(sleep, [0, 1], 2))


def test_every_task_is_answered_once():
    assert sorted(spoken._in_processes(str, range(7), 3)) == list("0123456")


def test_processes_that_speak_inherit_that_signals_are_ignored():
    before = signal.getsignal(signal.SIGINT)
    with spoken._ignoring(signal.SIGINT, signal.SIGHUP):
        child = subprocess.run([sys.executable, "-c", "import signal; print(repr(signal.getsignal(signal.SIGINT)))"],
                               capture_output=True, text=True)  # fmt: skip
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and "SIG_IGN" in child.stdout
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_while_a_process_is_started_comes_when_it_is_known(monkeypatch):
    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        pipe, process = start(*arguments)
        found.append(process)
        return pipe, process

    found, start = [], spoken._start
    monkeypatch.setattr(spoken, "_start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(spoken._in_processes(sleep, [0], 1))
    assert found[0].exitcode == -signal.SIGKILL
