"""benchmarks.robustness: its noise, rooms and telephone are what they are called, and no utterance is left out."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_checkpoints import make_checkpoint
from tiny_corpora import make_archive, make_manifest, make_speech

from benchmarks import robustness
from benchmarks.robustness import CONDITIONS, Recordings, changed, coloured_noise, impulse_response, speech_power
from benchmarks.rows import read_rows
from las_fast.data.corpus import Utterance
from las_fast.errors import InputError

RATE = 16000
WAVES = [make_speech(2.0, seed=seed) for seed in range(4)]
RECORDINGS = Recordings(RATE, WAVES, [speech_power(wave, RATE) for wave in WAVES])


def utterances(names="abcd"):
    return [Utterance(id=name, path=None, transcript="X") for name in names]


@pytest.mark.parametrize(("condition", "snr"), [("20 dB", 20), ("10 dB", 10), ("5 dB", 5), ("babble 10 dB", 10)])
def test_noise_has_its_ratio_to_the_speech(condition, snr):
    noise = changed(RECORDINGS, utterances(), 1, condition) - WAVES[1]
    assert 10 * np.log10(RECORDINGS.powers[1] / np.mean(noise**2)) == pytest.approx(snr, abs=0.01)


def test_the_power_of_speech_excludes_pauses():
    pause = (1e-3 * np.random.default_rng(0).standard_normal(RATE)).astype(np.float32)  # as between its syllables
    padded = np.concatenate([pause, WAVES[0], pause])
    assert speech_power(padded, RATE) == pytest.approx(RECORDINGS.powers[0], rel=0.1)
    assert np.mean(padded**2) < 0.6 * RECORDINGS.powers[0]
    assert speech_power(np.full(100, 0.5, np.float32), RATE) == pytest.approx(0.25 * 100 / 400)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_the_power_of_coloured_noise_falls_with_the_exponent(exponent):
    noise = coloured_noise(1 << 18, RATE, exponent, np.random.default_rng(0))
    power = np.abs(np.fft.rfft(noise)) ** 2
    hertz = np.fft.rfftfreq(len(noise), 1 / RATE)
    octaves = [power[(hertz >= f) & (hertz < 1.1 * f)].mean() for f in (100, 400, 1600)]
    assert np.diff(np.log2(octaves)) / 2 == pytest.approx([-exponent] * 2, abs=0.2)
    assert np.mean(noise**2) == pytest.approx(1)


def test_a_telephone_passes_300_to_3400_hz():
    time = np.arange(RATE) / RATE
    for hertz, passes in ((100, False), (1000, True), (3300, True), (3600, False), (5000, False)):
        tone = (0.1 * np.sin(2 * np.pi * hertz * time)).astype(np.float32)
        heard = robustness.telephone(Recordings(RATE, [tone], [1.0]), 0, np.random.default_rng(0))[4000:12000]
        assert np.std(heard) == pytest.approx(np.std(tone), rel=0.02) if passes else np.std(heard) < 1e-4


def test_a_room_has_its_t60_and_direct_sound():
    response = impulse_response(RATE, 0.4, 3.0, np.random.default_rng(0))
    assert response[0] == 1 and np.sum(response[1:] ** 2) == pytest.approx(10**-0.3)
    start, later = (np.mean(response[k : k + 800] ** 2) for k in (1, 1 + 3200))
    assert 10 * np.log10(start / later) == pytest.approx(30, abs=2)  # over half of T60
    delayed = robustness.convolve(WAVES[0], np.array([0.0, 0.0, 0.5]))
    np.testing.assert_allclose(delayed, np.concatenate([[0, 0], WAVES[0][:-2] / 2]), atol=1e-6)


def test_zeros_surround_the_recording():
    samples = changed(RECORDINGS, utterances(), 0, "4 s of zeros")
    assert np.array_equal(samples[64000:-64000], WAVES[0]) and not samples[:64000].any() and not samples[-64000:].any()


def test_an_utterance_is_changed_by_its_id_and_not_by_its_position():
    swapped = Recordings(RATE, [WAVES[i] for i in (1, 0, 2, 3)], [RECORDINGS.powers[i] for i in (1, 0, 2, 3)])
    for condition in ("10 dB", "reverberant"):
        one = changed(RECORDINGS, utterances(), 0, condition)
        assert np.array_equal(one, changed(swapped, utterances("bacd"), 1, condition))
        assert not np.array_equal(one, changed(RECORDINGS, utterances("xbcd"), 0, condition))


def test_every_condition_is_scored_on_every_utterance(tmp_path, monkeypatch, capsys):
    manifest, model = make_manifest(tmp_path / "data"), make_checkpoint(tmp_path, 20, mel_bins=23)
    monkeypatch.setattr(robustness, "FILE", tmp_path / "rows.csv")
    argv = ["--checkpoint", str(model), "--data", str(manifest), "--split", "dev", "--by", "source", "--record"]
    robustness.main([*argv, "--ways", "greedy", "best"])
    rows = read_rows(tmp_path / "rows.csv")
    cells = {(row["condition"], row["way"], row["part"]) for row in rows}
    assert cells == {(c, way, part) for c in CONDITIONS for way in ("greedy", "best") for part in ("all", "made")}
    assert len(rows) == len(cells) and {row["utterances"] for row in rows} == {"4"}
    printed = capsys.readouterr().out
    assert "| reverberant |" in printed and "(x 1.00)" in printed
    robustness.main([*argv, "--limit", "3", "--conditions", "10 dB"])
    last = read_rows(tmp_path / "rows.csv")[len(rows) :]
    assert {(row["condition"], row["utterances"]) for row in last} == {("10 dB", "3")}
    assert "(x" not in capsys.readouterr().out


def test_what_cannot_be_measured_is_refused(tmp_path):
    model, manifest = make_checkpoint(tmp_path, 20, mel_bins=23), make_manifest(tmp_path / "data")
    argv = ["--checkpoint", str(model), "--data", str(manifest), "--split", "dev"]
    for limit in ("5", "0"):
        with pytest.raises(InputError, match=f"--limit must be 2 to 4, the size of dev; got {limit}"):
            robustness.main([*argv, "--limit", limit])
    with pytest.raises(InputError, match="does not have column 'colour' on every line"):
        robustness.main([*argv, "--by", "colour"])
    archive = make_archive(tmp_path / "archive", "F24")
    with pytest.raises(InputError, match="has features, and the recipe changes recordings"):
        robustness.main(["--checkpoint", str(model), "--data", str(archive), "--split", "dev-clean"])
    lines = manifest.read_text().splitlines()
    manifest.write_text("\n".join(line.rpartition("\t")[0] + "\t" if "dev-2" in line else line for line in lines))
    with pytest.raises(InputError, match="dev-2.wav has no transcript"):
        robustness.main(argv)
