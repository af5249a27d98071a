"""benchmarks.interview: the interview that it makes, the rules of subtitles, and its row."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile
from tiny_checkpoints import make_checkpoint
from tiny_corpora import make_speech

from benchmarks import interview as command
from las_fast.data.audio import load_audio
from las_fast.data.layouts import open_corpus
from las_fast.errors import InputError
from las_fast.output.subtitles import Cue, make_cues
from las_fast.output.transcripts import Word

TEXTS = ("YES", "NO", "MAYBE")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for seed, text in enumerate(TEXTS):
        soundfile.write(folder / f"dev-{text}.wav", make_speech(1.5, seed=seed), 16000)
    rows = ["path\tsplit\ttranscript", *(f"dev-{text}.wav\tdev\t{text}" for text in TEXTS)]
    (folder / "manifest.tsv").write_text("\n".join(rows) + "\n")
    return folder / "manifest.tsv"


def words(*times):
    return [Word("WORD", start, end, 1.0) for start, end in times]


def cue(*times, start=None, end=None):
    """A cue of one line with words at these times."""
    line = words(*times)
    return Cue(line[0].start if start is None else start, line[-1].end if end is None else end, (tuple(line),))


def test_an_interview_has_the_utterances_at_its_bounds_with_pauses_between_them(manifest):
    utterances = open_corpus(manifest).utterances("dev")
    samples, bounds = command.make_interview(utterances, 5.0, 0)
    assert samples.dtype == np.float32 and len(samples) >= 5 * 16000 and bounds[0][0] == 1.0
    assert {text for *_, text in bounds[:3]} == set(TEXTS)
    speech = {u.transcript: load_audio(u.path, 16000) for u in utterances}
    for (start, end, text), (following, *_) in zip(bounds, bounds[1:], strict=False):
        part = samples[round(start * 16000) : round(end * 16000)]
        assert np.corrcoef(part, speech[text])[0, 1] > 0.99 and np.std(part) == pytest.approx(0.06, rel=0.05)
        assert 0.29 < following - end <= 1.5
    assert command.make_interview(utterances, 5.0, 1)[1] != bounds


def test_cues_of_the_program_break_no_rule():
    cues = make_cues(words(*((0.4 * i, 0.4 * i + 0.3) for i in range(40)), (30.0, 30.2)))
    assert len(cues) > 2 and list(command.broken_rules(cues)) == []


@pytest.mark.parametrize(
    ("cues", "problem"),
    [
        ([cue((0.0, 0.5), (0.6, 1.2), end=9.0)], "is shown for 9.00 s"),
        ([cue((0.0, 0.5), (2.0, 3.0))], "has a pause of 1.50 s in it"),
        ([cue((0.0, 1.5)), cue((1.4, 3.0))], "overlap"),
        ([cue((1.0, 1.2))], "is shown for 0.20 s, although there is time"),
        ([cue(*((0.1 * i, 0.1 * i + 0.1) for i in range(12)))], "is not 2 lines of 42 characters"),
    ],
)
def test_each_broken_rule_is_reported(cues, problem):
    (sentence,) = command.broken_rules(cues)
    assert problem in sentence


def test_utterances_of_a_cue_are_counted_by_their_middles():
    bounds = [(0.0, 1.0, "A"), (2.0, 3.0, "B"), (4.0, 5.0, "C")]
    assert command.utterances_per_cue([cue((0.0, 2.4)), cue((2.45, 5.0))], bounds) == 2
    assert command.utterances_per_cue([], bounds) == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--minutes", "0"], "--minutes must be from 0.1 to 600; got 0"),
        (["--minutes", "nan"], "--minutes must be from 0.1 to 600; got nan"),
    ],
)
def test_wrong_options_are_one_sentence(manifest, argv, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        command.main(["--data", str(manifest), *argv])


def test_the_command_measures_an_interview(manifest, tmp_path, capsys):
    checkpoint = make_checkpoint(tmp_path, 20, mel_bins=23)
    command.main(["--data", str(manifest), "--source", "dev", "--minutes", "0.1", "--checkpoint", str(checkpoint)])
    row = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert row["minutes"] == "0.1" and float(row["cer"]) > 0 and float(row["cer_true_boundaries"]) > 0
    assert int(row["peak_mib"]) > 100


def test_a_failure_of_transcribe_is_reported(tmp_path):
    with pytest.raises(InputError, match="transcribe failed with exit status 2; its error is above"):
        command.transcribe(tmp_path / "missing.wav", "an4")
