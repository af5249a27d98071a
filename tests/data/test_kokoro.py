"""Speech of Kokoro-82M: its plan, its files, and its continuation. A stand-in replaces the model."""

import argparse
import errno
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import types
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile

from las_fast.data import kokoro, kokoro_model, kokoro_workers
from las_fast.data.audio import load_utterance
from las_fast.data.kokoro import PlannedUtterance, Studio, generate, plan, transcript_of
from las_fast.data.kokoro_model import Kokoro, Speaker, make_speakers, read_voices
from las_fast.data.layouts import open_corpus
from las_fast.data.overlap import Excluded
from las_fast.errors import InputError
from las_fast.files import lock_folder
from las_fast.text import CHARACTERS

NAMES = ["af_a", "af_b", "am_c", "bf_d", "bm_e"]
WORDS = ["ONE", "TWO", "THREE", "FOUR", "FIVE", "SIX", "SEVEN", "EIGHT", "NINE", "TEN"]
TEXTS = [" ".join(words) for words in itertools.islice(itertools.permutations(WORDS, 5), 0, None, 700)]


class Tone:
    """Speaks a tone of 0.4 s per word, of a pitch that depends on the speaker."""

    sample_rate = 24000

    def __init__(self, wait=0.0):
        self.wait = wait

    def speak(self, text, speaker, *, speed):
        time.sleep(self.wait)
        assert text == text.lower() and 0.85 <= speed <= 1.2
        length = int(0.4 * len(text.split()) / speed * self.sample_rate)
        return np.sin(np.arange(length) / (20 + 20 * max(speaker.blend.values()))).astype(np.float32) * 0.7


class Broken:
    """Cannot be opened."""

    def __init__(self):
        raise InputError("the model is damaged")


class Crashing(Tone):
    """Ends its process."""

    def speak(self, text, speaker, *, speed):
        os._exit(7)


class Killed(Tone):
    """Is killed, as the system does if memory runs out."""

    def speak(self, text, speaker, *, speed):
        os.kill(os.getpid(), signal.SIGKILL)


class FullDisk(Tone):
    """Cannot write a temporary file."""

    def speak(self, text, speaker, *, speed):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Temporary(Tone):
    """Has a temporary file, which its finalizer removes."""

    def __init__(self, folder, wait=0.0):
        super().__init__(wait)
        folder.mkdir(exist_ok=True)
        handle, path = tempfile.mkstemp(dir=folder)
        os.close(handle)
        weakref.finalize(self, os.remove, path)


class Stuck(Tone):
    """Speaks once, and then hangs."""

    def speak(self, text, speaker, *, speed):
        time.sleep(self.wait)
        self.wait = 100
        return Tone().speak(text, speaker, speed=speed)


class Silent(Tone):
    """Has no sound for any text."""

    def speak(self, text, speaker, *, speed):
        return super().speak(text, speaker, speed=speed) * (0 if text < "o" else np.nan)


class Mute(Tone):
    """Has no sound for half of the texts."""

    def speak(self, text, speaker, *, speed):
        wave = super().speak(text, speaker, speed=speed)
        return wave[:0] if text < "h" else wave * 0 if text < "o" else wave


def studio(synthesiser=Tone, seed=1):
    return Studio(synthesiser, tuple(make_speakers(NAMES, 20, seed)), seed)


def make(out, *, seconds=20.0, texts=TEXTS, synthesiser=Tone, seed=1, **options):
    return generate(out, texts=texts, studio=studio(synthesiser, seed), hours=seconds / 3600, show=False, **options)


def contents(out):
    """The manifest, and the samples of every recording."""
    sounds = {str(path.relative_to(out)): soundfile.read(path)[0].tobytes() for path in out.rglob("*.ogg")}
    return (out / "manifest.tsv").read_text(), sounds


# --------------------------------------------------------------------------------------------------------------- plan


def test_sentences_are_drawn_without_repetition():
    planned = list(plan(TEXTS + TEXTS, None, 1))
    assert sorted(u.transcript for u in planned) == sorted(TEXTS)
    assert [u.number for u in planned] == list(range(len(TEXTS)))
    assert [u.transcript for u in planned] != TEXTS
    assert planned != list(plan(TEXTS, None, 2))


@pytest.mark.parametrize(
    "text",
    ["ONE TWO THREE", " ".join(["WORD"] * 26), "it cost 5 pounds in all", "salt & pepper for two", "",
     " ".join(["EXTRAORDINARILY"] * 17),
     *(f"one two {sign} three four" for sign in "%@#*/\\^_§¶+=<>|~$£€¥×±°©♥Ⅳ"),
     "the letter α comes first", "he said Привет to us", "a length of some µm"],
)  # fmt: skip
def test_sentences_that_are_short_or_long_or_not_letters_are_left_out(text):
    assert transcript_of(text) is None


@pytest.mark.parametrize("text", ["one, two; (three) \u2013 four", "\u201cone two\u201d\u2014three \u2018four\u2019",
                                  "øne twó thrée\u2026 four!", "o\u0301ne two: three. Four?"])  # fmt: skip
def test_sentences_with_accents_quotes_and_dashes_are_used(text):
    assert transcript_of(text).replace("'", "") == "ONE TWO THREE FOUR"


def test_the_synthesiser_gets_capitals_in_lower_case_and_other_text_as_it_is():
    texts = ["I'M HERE ON MONDAY", '"Well-known," said Élise, "to us."']
    assert {u.text: u.transcript for u in plan(texts, None, 1)} == {
        "i'm here on monday": "I'M HERE ON MONDAY",
        '"Well-known," said Élise, "to us."': "WELL KNOWN SAID ELISE TO US",
    }


def test_sentences_that_overlap_with_excluded_texts_are_left_out():
    texts = ["A B C D E F G H", "X A B C D E F", "A B C D E X F G", "MY OWN FOUR WORDS"]
    excluded = Excluded(["A B C D E F", "MY OWN FOUR WORDS"], CHARACTERS)
    assert [u.transcript for u in plan(texts, excluded, 1)] == ["A B C D E X F G"]


def test_speakers_are_distinct_blends_of_two_or_three_voices():
    speakers = make_speakers(NAMES, 400, 1)
    assert {len(speaker.blend) for speaker in speakers} == {2, 3}
    assert {voice for speaker in speakers for voice in speaker.blend} == set(NAMES)
    assert all(sum(speaker.blend.values()) == pytest.approx(1) for speaker in speakers)
    assert len({str(speaker.blend) for speaker in speakers}) == len({speaker.name for speaker in speakers}) == 400
    assert speakers[:20] == make_speakers(NAMES, 20, 1) != make_speakers(NAMES, 20, 2)


def test_the_accent_is_that_of_the_voice_with_the_largest_weight():
    assert Speaker("s", {"af_a": 0.4, "bm_e": 0.6}).language == "en-gb"
    assert Speaker("s", {"af_a": 0.6, "bm_e": 0.4}).language == "en-us"


# ------------------------------------------------------------------------------------------------------------- speech


def test_a_recording_has_silence_and_faint_noise_around_speech_of_a_fixed_peak():
    wave = np.concatenate([np.zeros(12000), 0.1 * np.sin(np.arange(24000) / 9), np.zeros(24000)]).astype(np.float32)
    finished = kokoro.finish(wave, 24000, np.random.default_rng(1))
    assert finished.dtype == np.float32 and np.abs(finished).max() == pytest.approx(0.5, abs=0.02)
    speech = np.flatnonzero(np.abs(finished) > 0.1)
    assert 0.05 <= speech[0] / 16000 < 0.42 and 0.05 <= (len(finished) - speech[-1]) / 16000 < 0.42
    assert (speech[-1] - speech[0]) / 16000 == pytest.approx(1, abs=0.01)
    assert 1e-4 < finished[:700].std() < 4e-3
    for silence in (wave[:0], wave * 0, wave * np.nan):
        assert kokoro.finish(silence, 24000, np.random.default_rng(1)).size == 0


def test_the_same_seed_gives_the_same_speech_for_any_number_of_processes(tmp_path):
    for name, options in {"1": {}, "2": {"jobs": 2}, "other": {"seed": 2}}.items():
        count, seconds = make(tmp_path / name, **options)
        assert count >= 8 and 20 <= seconds < 25
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert contents(tmp_path / "1")[0] != contents(tmp_path / "other")[0]


def test_failures_of_a_process_are_reported(tmp_path):
    with pytest.raises(InputError, match="the model is damaged"):
        make(tmp_path / "a", synthesiser=Broken, jobs=2)
    with pytest.raises(InputError, match=r"ended early \(exit status 7\); correct what .* run again to continue"):
        make(tmp_path / "b", synthesiser=Crashing, jobs=2)
    with pytest.raises(InputError, match=r"ended early \(exit status -9\); free some memory, .* run again to continue"):
        make(tmp_path / "c", synthesiser=Killed, jobs=2)
    with pytest.raises(InputError, match="^no space is left on the disk .*; free some$"):
        make(tmp_path / "d", synthesiser=FullDisk, jobs=2)


def test_processes_end_with_their_finalizers(tmp_path):
    make(tmp_path / "out", synthesiser=partial(Temporary, tmp_path / "parts", 0.1), jobs=2)
    assert list((tmp_path / "parts").iterdir()) == []


def test_processes_that_do_not_end_are_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(kokoro_workers, "GRACE", 0.1)
    began = time.monotonic()
    make(tmp_path, synthesiser=Stuck, seconds=1, jobs=2)
    assert multiprocessing.active_children() == [] and time.monotonic() - began < 90


def test_a_stop_signal_to_all_processes_also_ends_them_with_their_finalizers(tmp_path):
    process = start(tmp_path / "out", jobs=2)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert list((tmp_path / "parts").iterdir()) == []


# -------------------------------------------------------------------------------------------------------------- files


def test_the_manifest_opens_as_a_corpus_and_every_recording_loads(tmp_path):
    count, seconds = make(tmp_path)
    for root in (tmp_path, tmp_path / "manifest.tsv"):
        corpus = open_corpus(root)
        utterances = corpus.utterances("train")
        assert len(utterances) == count and corpus.kind == "audio"
    lengths = [len(load_utterance(utterance, 16000, strict=True)) for utterance in utterances]
    assert sum(lengths) / 16000 == pytest.approx(seconds, abs=0.01)
    assert {utterance.transcript for utterance in utterances} <= set(TEXTS)
    rows = [line.split("\t") for line in (tmp_path / "manifest.tsv").read_text().splitlines()]
    assert rows[0] == ["id", "path", "seconds", "speaker", "split", "source", "transcript"]
    assert [row[0] for row in rows[1:]] == [f"kokoro-{i:06d}" for i in range(count)]
    assert {tuple(row[4:6]) for row in rows[1:]} == {("train", "kokoro")}
    assert len({row[3] for row in rows[1:]}) > 3


def test_more_hours_continue_a_folder(tmp_path):
    make(tmp_path / "once", seconds=30)
    make(tmp_path / "twice", seconds=12)
    before = (tmp_path / "twice" / "manifest.tsv").read_text()
    made = make(tmp_path / "twice", seconds=30)
    assert contents(tmp_path / "once") == contents(tmp_path / "twice")
    assert (tmp_path / "twice" / "manifest.tsv").read_text().startswith(before)
    assert make(tmp_path / "twice", seconds=5) == pytest.approx(made)  # nothing to do


STARTED = """
import sys; sys.path.insert(0, sys.argv[1])
from functools import partial
from pathlib import Path
import test_kokoro
from las_fast.cli import run
out = Path(sys.argv[2])
synthesiser = partial(test_kokoro.Temporary, out.parent / "parts", 0.3)
run(lambda argv: test_kokoro.make(out, synthesiser=synthesiser, jobs=int(sys.argv[3])))
"""


def start(out, jobs):
    """Start a run in a process group of its own, and return it when it has written three recordings."""
    command = [sys.executable, "-c", STARTED, str(Path(__file__).parent), str(out), str(jobs)]
    process = subprocess.Popen(command, start_new_session=True)
    manifest, deadline = out / "manifest.tsv", time.monotonic() + 120
    while not (manifest.exists() and manifest.read_text().count("\n") > 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_killed_run_continues_with_the_same_speech(tmp_path, jobs):
    out = tmp_path / "killed"
    process = start(out, jobs)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with (out / "manifest.tsv").open("a") as file:
        file.write("kokoro-000004\taudio/000/kok")  # as if it had been killed while it wrote the line
    assert make(out)[0] > 4
    make(tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")
    assert not list(out.rglob(".*.partial"))


def test_texts_without_sound_are_left_out_also_on_continuing(tmp_path):
    make(tmp_path / "once", synthesiser=Mute)
    for seconds in (6, 20):
        make(tmp_path / "twice", synthesiser=Mute, seconds=seconds)
    assert contents(tmp_path / "once") == contents(tmp_path / "twice")
    names = [line.split("\t")[0] for line in contents(tmp_path / "once")[0].splitlines()[1:]]
    assert int(names[-1].removeprefix("kokoro-")) >= len(names)  # the numbers have gaps


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "options, changed",
    [({"seed": 2}, "seed and speakers"), ({"texts": TEXTS[1:]}, "text"), ({"model": "b"}, "model"),
     ({"excluded": Excluded(["HELLO"], CHARACTERS)}, "excluded text")],
)  # fmt: skip
def test_a_folder_of_other_settings_is_refused(tmp_path, options, changed):
    make(tmp_path, seconds=2)
    with pytest.raises(InputError, match=f"was begun with another {changed}; "):
        make(tmp_path, **options)


def test_two_runs_do_not_share_a_folder(tmp_path):
    with (
        lock_folder(tmp_path, "synthesis"),
        pytest.raises(InputError, match="another synthesis is writing into .*; wait"),
    ):
        make(tmp_path)
    assert os.listdir(tmp_path) == [".lock"]
    make(tmp_path, seconds=2)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(InputError, match="contains something other than speech of Kokoro; give --out a new folder"):
        make(tmp_path)


def test_damaged_files_are_refused(tmp_path):
    make(tmp_path, seconds=2)
    manifest = (tmp_path / "manifest.tsv").read_text()
    (tmp_path / "manifest.tsv").write_text(manifest + "nonsense\n")
    with pytest.raises(InputError, match=f"line {manifest.count(chr(10)) + 1} is damaged; restore it"):
        make(tmp_path)
    for damaged in ("{", "[1]"):
        (tmp_path / "kokoro.json").write_text(damaged)
        with pytest.raises(InputError, match="kokoro.json is damaged"):
            make(tmp_path)


def test_texts_that_do_not_suffice_are_an_error_with_what_there_is(tmp_path):
    with pytest.raises(InputError, match=r"the text ran out: .* has 0.00 of the 0.1 hours; for more, give"):
        make(tmp_path / "a", texts=TEXTS[:3], seconds=360)
    assert len(open_corpus(tmp_path / "a").utterances("train")) == 3
    with pytest.raises(InputError, match="none of the 1 sentences can be used"):
        make(tmp_path / "b", texts=["HELLO"])


# -------------------------------------------------------------------------------------------------------------- model


@pytest.fixture
def voices(tmp_path):
    """A folder of voices; row n - 1 of voice i is 100 i + n."""
    folder = tmp_path / "voices"
    folder.mkdir()
    for i, name in enumerate([*NAMES, "ef_dora"]):
        (np.ones((6, 256), "<f4") * np.arange(1, 7)[:, None] + 100 * i).astype("<f4").tofile(folder / f"{name}.bin")
    return folder


class Session:
    """Stand-in for onnxruntime's session."""

    inputs = ("tokens", "style", "speed")

    def __init__(self, path, options, providers):
        if path.read_bytes() != b"onnx":
            raise ValueError("Protobuf\nparsing failed")
        assert options.intra_op_num_threads == options.inter_op_num_threads == 1
        assert providers == ["CPUExecutionProvider"]

    def get_inputs(self):
        return [types.SimpleNamespace(name=name) for name in self.inputs]

    def run(self, outputs, inputs):
        self.given = inputs
        return [np.ones((1, 3), np.float32)]


class Tokenizer:
    """Stand-in for kokoro-onnx's: one token per letter."""

    def phonemize(self, text, language):
        return {"en-us": text, "en-gb": text + "(fr)r(de)"}[language]

    def tokenize(self, phonemes, limit=510):
        assert limit is None
        return [ord(c) for c in phonemes]


@pytest.fixture
def model(tmp_path, monkeypatch):
    runtime = types.SimpleNamespace(SessionOptions=argparse.Namespace, InferenceSession=Session)
    monkeypatch.setattr(kokoro_model, "load_packages", lambda: (runtime, Tokenizer))
    path = tmp_path / "model.onnx"
    path.write_bytes(b"onnx")
    return path


def test_the_model_gets_tokens_and_the_blended_style_of_their_number(model, voices):
    synthesiser = Kokoro(model, voices)
    speaker = Speaker("s", {"af_b": 0.25, "bf_d": 0.75})
    assert synthesiser.speak("ab", speaker, speed=1.1).tolist() == [1, 1, 1]
    given = synthesiser._session.given
    assert given["tokens"].tolist() == [[0, 97, 98, 114, 0]] and given["tokens"].dtype == np.int64
    assert given["style"].shape == (1, 256) and given["style"].dtype == np.float32
    assert np.unique(given["style"]).tolist() == [0.25 * 103 + 0.75 * 303]  # three tokens
    assert given["speed"].tolist() == pytest.approx([1.1]) and given["speed"].dtype == np.float32
    synthesiser.speak("abcdefgh", replace(speaker, blend={"af_a": 1.0}), speed=1.0)
    assert np.unique(synthesiser._session.given["style"]).tolist() == [6]  # the last row
    for text, spoken in {"": 0, "a" * 510: 3, "a" * 511: 0}.items():
        assert len(synthesiser.speak(text, Speaker("s", {"af_a": 1.0}), speed=1.0)) == spoken


def test_a_model_that_is_none_is_an_input_error(model, voices, monkeypatch):
    with pytest.raises(InputError, match=r"nowhere.onnx is not a file; .*README.md has the commands that fetch"):
        Kokoro(model.with_name("nowhere.onnx"), voices)
    monkeypatch.setattr(Session, "inputs", ("x",))
    with pytest.raises(InputError, match="has the inputs x, not those of Kokoro"):
        Kokoro(model, voices)
    model.write_bytes(b"hello")
    with pytest.raises(InputError, match=r"does not load as an ONNX model \(Protobuf parsing failed\); las_fast"):
        Kokoro(model, voices)


def test_only_english_voices_are_read_and_three_are_needed(voices):
    assert list(read_voices(voices)) == NAMES
    (voices / "am_c.bin").write_bytes(b"x" * 1024)
    with pytest.raises(InputError, match="voices of 1024, 6144 bytes, not all of the same multiple of 1024"):
        read_voices(voices)
    for name in NAMES[:3]:
        (voices / f"{name}.bin").unlink()
    with pytest.raises(InputError, match="has 2 English voices .*, not 3 or more"):
        read_voices(voices)


def test_missing_packages_come_with_the_command_that_installs_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "kokoro_onnx", None)
    monkeypatch.setitem(sys.modules, "kokoro_onnx.tokenizer", None)
    with pytest.raises(InputError, match="needs kokoro-onnx .*; install it with: pip install kokoro-onnx"):
        kokoro.load_packages()


# ------------------------------------------------------------------------------------------------------------ command


def test_the_command_synthesises_and_excludes_the_dev_texts(tmp_path, model, voices, monkeypatch, capsys):
    monkeypatch.setattr(kokoro, "load_packages", lambda: None)
    monkeypatch.setattr(kokoro, "Kokoro", lambda *paths: Tone() if paths == (model, voices) else None)
    (tmp_path / "text").write_text("\n".join(TEXTS))
    lines = ["path\tsplit\ttranscript", *(f"{i}.wav\tdev\t{text}" for i, text in enumerate(TEXTS[5:]))]
    (tmp_path / "dev.tsv").write_text("\n".join(lines) + "\n")
    argv = ["--text", tmp_path / "text", "--hours", 0.001, "--out", tmp_path / "out", "--model", model, "--voices",
            voices, "--exclude", tmp_path / "dev.tsv", "--speakers", 7]  # fmt: skip
    kokoro.main([str(word) for word in argv])
    printed = capsys.readouterr().out
    assert printed.startswith(f"{tmp_path / 'out' / 'manifest.tsv'}: 0.1 minutes, ")
    utterances = open_corpus(tmp_path / "out").utterances("train")
    assert utterances and {utterance.transcript for utterance in utterances} <= set(TEXTS[:5])
    assert json.loads((tmp_path / "out" / "kokoro.json").read_text())["speakers"].startswith("7 (")


def test_the_command_stops_early_if_the_model_returns_only_silence(tmp_path, model, voices, monkeypatch):
    spoken = []
    monkeypatch.setattr(kokoro, "load_packages", lambda: None)
    monkeypatch.setattr(kokoro, "Kokoro", lambda *paths: Silent())
    monkeypatch.setattr(Studio, "record", lambda *args, record=Studio.record: spoken.append(args) or record(*args))
    texts = itertools.islice(itertools.permutations(WORDS, 5), 0, None, 250)
    (tmp_path / "text").write_text("\n".join(map(" ".join, texts)))
    argv = ["--text", tmp_path / "text", "--hours", 1, "--out", tmp_path / "out", "--model", model, "--voices", voices]
    with pytest.raises(InputError, match=r"model.onnx returned silence instead of speech for 50 sentences in a row"):
        kokoro.main([str(word) for word in argv])
    assert len(spoken) == 50


@pytest.mark.parametrize(
    "argv, sentence",
    [(["--hours", "0"], "--hours must be more than 0 and at most 10000; got 0"),
     (["--hours", "nan"], "--hours must be more than 0 and at most 10000; got nan"),
     (["--hours", "1", "--jobs", "0"], "--jobs must be from 1 to 256; got 0"),
     (["--hours", "1", "--speakers", "0"], "--speakers must be from 1 to 100000; got 0"),
     (["--hours", "1", "--seed", "-1"], "--seed must be from 0 to 9223372036854775807; got -1")],
)  # fmt: skip
def test_options_out_of_range_are_refused(argv, sentence):
    with pytest.raises(InputError, match=sentence):
        kokoro.main(["--text", "t", "--out", "o", *argv])


def test_paths_count_a_thousand_recordings_per_folder():
    assert PlannedUtterance(12345, "", "").path == "audio/012/kokoro-012345.ogg"
