"""Mixing of channels, scale of samples, and warnings on the signal."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile
import soxr
from recordings import FLAC, MP3, OPUS, RATE, VORBIS, WAV, encoded, put, read, refusal, stereo_file, waveform

from las_fast.data import audio
from las_fast.data.audio import load_audio, load_utterance, open_recording
from las_fast.data.channels import Mixer
from las_fast.data.corpus import Utterance
from las_fast.data.decoder import SoundStream
from las_fast.data.quality import SignalQuality
from las_fast.errors import InputError

# --------------------------------------------------------------------------------------------------------- channels


def test_channels_are_averaged(tmp_path):
    left = waveform(0.2)
    samples, warnings = read(stereo_file(tmp_path, left, np.zeros_like(left)))
    np.testing.assert_allclose(samples, left / 2, atol=1e-4)
    assert not warnings


@pytest.mark.parametrize("factor", [-1.0, -0.97, -1.1])
@pytest.mark.parametrize("options", [WAV, FLAC, VORBIS], ids=lambda o: "-".join(o.values()))
def test_channels_of_opposite_phase_do_not_cancel(tmp_path, factor, options):
    left = waveform(3.0)
    path = stereo_file(tmp_path, left, factor * left, **options)
    samples, warnings = read(path)
    assert abs(np.corrcoef(samples, left)[0, 1]) > 0.98
    assert np.std(samples) > 0.9 * np.std(left)
    assert "channels cancel each other out" in warnings[0]
    np.testing.assert_array_equal(samples, load_audio(path, RATE, strict=True))


def test_channels_that_change_phase_midway_do_not_cancel(tmp_path):
    left = waveform(8.0)
    sign = np.where(np.arange(len(left)) < 4 * RATE, 1, -1)
    samples, _ = read(stereo_file(tmp_path, left, sign * left))
    for half in (slice(0, 4 * RATE), slice(4 * RATE, None)):
        assert np.std(samples[half]) > 0.9 * np.std(left[half])


def test_hum_of_opposite_phase_is_ignored(tmp_path):
    speech = waveform(3.0)
    hum = 0.5 * np.sin(2 * np.pi * 50 * np.arange(len(speech)) / RATE).astype(np.float32)
    samples, warnings = read(stereo_file(tmp_path, 0.5 * speech + hum, 0.5 * speech - hum))
    np.testing.assert_allclose(samples, 0.5 * speech, atol=1e-4)
    assert not warnings


def test_quiet_channels_of_opposite_phase_do_not_cancel(tmp_path):
    left = waveform(3.0) / 500
    samples, warnings = read(stereo_file(tmp_path, left, -left, format="WAV", subtype="FLOAT"))
    np.testing.assert_allclose(samples, left, atol=1e-6)
    assert any("channels cancel" in sentence for sentence in warnings)


@pytest.mark.parametrize("speaking", [0, 2, 5])
def test_speech_in_one_of_six_channels_is_kept(tmp_path, speaking):
    speech, silence = waveform(2.0), np.zeros(2 * RATE, np.float32)
    samples, _ = read(stereo_file(tmp_path, *(speech if k == speaking else silence for k in range(6))))
    assert np.std(samples) > 0.16 * np.std(speech)


def test_unrelated_channels_are_averaged_without_a_warning(tmp_path):
    samples, warnings = read(stereo_file(tmp_path, *(channels := [waveform(3.0, k) for k in range(2)])))
    np.testing.assert_allclose(samples, np.mean(channels, axis=0), atol=1e-4)
    assert not warnings


# ----------------------------------------------------------------------------------------------------------- the signal


@pytest.mark.parametrize("rate", [8000, 11025])
def test_a_rate_below_the_models_is_a_warning(tmp_path, rate):
    warnings = read(put(tmp_path, encoded(waveform(2.0), rate, **WAV)))[1]
    assert len(warnings) == 1 and f"{rate} Hz" in warnings[0] and "16000 Hz" in warnings[0]


@pytest.mark.parametrize("options", [WAV, FLAC, OPUS, MP3], ids=lambda o: "-".join(o.values()))
@pytest.mark.parametrize("level", [1.0, 0.05])
def test_upsampled_telephone_speech_is_a_warning(tmp_path, options, level):
    narrow = soxr.resample(level * waveform(4.0), 8000, RATE)  # 8 s with nothing above 4 kHz
    warnings = read(put(tmp_path, encoded(narrow, **options)))[1]
    assert len(warnings) == 1 and "nothing above 4 kHz" in warnings[0] and "8000 Hz" in warnings[0]


def test_ordinary_recordings_are_read_without_a_warning(shared):
    paths = sorted((shared / "speech" / "audio").rglob("*.ogg"))[::400]
    if not paths:
        pytest.skip("../shared has no recordings")
    warnings = [read(path)[1] for path in paths]
    assert sum(map(bool, warnings)) <= len(paths) // 50
    assert [path for path in paths if len(load_audio(path, RATE, strict=True)) < 1000] == []


@pytest.mark.parametrize("bits", [16, 24, 32])
@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
def test_integers_stored_as_floats_are_scaled(tmp_path, bits, subtype):
    samples = waveform(5.0)
    samples[: 2 * RATE] *= 1e-4  # the first block alone does not show it
    path = tmp_path / "x.wav"
    soundfile.write(path, samples * 2.0 ** (bits - 1), RATE, subtype=subtype)
    loaded, warnings = read(path)
    np.testing.assert_allclose(loaded, samples, rtol=1e-6)
    assert f"{bits}-bit numbers" in warnings[0]
    np.testing.assert_array_equal(loaded, load_audio(path, RATE, strict=True))
    np.testing.assert_array_equal(loaded[RATE : 2 * RATE], load_audio(path, RATE, start=1.0, seconds=1.0))


def test_a_loud_mix_in_floating_point_keeps_its_scale(tmp_path):
    soundfile.write(tmp_path / "x.wav", 30 * waveform(2.0), RATE, subtype="FLOAT")
    np.testing.assert_array_equal(load_audio(tmp_path / "x.wav", RATE), 30 * waveform(2.0))


def test_a_few_loud_samples_are_not_another_scale(tmp_path):
    samples = waveform(2.0)
    samples[100] = 7.0
    path = tmp_path / "x.wav"
    soundfile.write(path, samples, RATE, subtype="FLOAT")
    np.testing.assert_array_equal(load_audio(path, RATE), samples)


@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT"])
def test_a_very_quiet_recording_is_a_warning(tmp_path, subtype):
    soundfile.write(tmp_path / "x.wav", waveform() / 400, RATE, subtype=subtype)
    assert "very quiet" in read(tmp_path / "x.wav")[1][0]


def test_a_clipped_recording_is_a_warning(tmp_path):
    path = put(tmp_path, encoded(np.clip(20 * waveform(), -0.99, 0.99), **WAV))
    assert "is clipped" in read(path)[1][0]


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("channels", [1, 2])
def test_samples_that_are_not_audio_are_refused(tmp_path, wrong, channels):
    samples = np.stack([waveform(3.0)] * channels, 1)
    samples[-100, -1] = wrong
    soundfile.write(tmp_path / "x.wav", samples, RATE, subtype="FLOAT")
    with pytest.raises(InputError, match="x.wav contains NaN, infinite or enormous samples"):
        load_audio(tmp_path / "x.wav", RATE)


@pytest.mark.parametrize("rate", [1, 999, 768_001, 2**31 - 1])
def test_a_rate_that_no_recording_has_is_refused(tmp_path, rate):
    soundfile.write(tmp_path / "x.wav", waveform(), rate)
    with pytest.raises(
        InputError, match=f"x.wav has a sample rate of {rate} Hz in its header; expected 1000 to 768000 Hz"
    ):
        load_audio(tmp_path / "x.wav", RATE)


# ---------------------------------------------------------------------------------------------------- limits, exactly


def noise(seconds: float, seed: int) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).normal(size=int(seconds * RATE)).astype(np.float32)


FLOAT = {"format": "WAV", "subtype": "FLOAT"}


def related(correlation: float, seconds: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Make two channels of noise. The energy of their mean is 1 + correlation times that of unrelated channels."""
    left, other = noise(seconds, 1), noise(seconds, 2)
    return left, (correlation * left + np.sqrt(1 - correlation**2) * other).astype(np.float32)


@pytest.mark.parametrize(("correlation", "cancel"), [(-0.85, False), (-0.95, True)])
def test_channels_cancel_below_a_tenth_of_their_energy(tmp_path, correlation, cancel):
    left, right = related(correlation)
    samples, warnings = read(stereo_file(tmp_path, left, right, **FLOAT))
    np.testing.assert_allclose(samples, left if cancel else (left + right) / 2, atol=1e-6)
    assert bool(warnings) == cancel


@pytest.mark.parametrize(("correlation", "together"), [(-0.4, True), (-0.6, False)])
def test_channels_are_averaged_again_above_half_of_their_energy(tmp_path, correlation, together):
    left, right = related(correlation)
    path = stereo_file(tmp_path, np.tile(left, 2), np.concatenate([-left, right]), **FLOAT)
    samples, warnings = read(path)
    np.testing.assert_array_equal(samples[:RATE], left)
    np.testing.assert_allclose(samples[RATE:], (left + right) / 2 if together else left, atol=1e-6)
    assert len(warnings) == 1


@pytest.mark.parametrize(("share", "chosen"), [(0.15, 0), (0.05, 2)])
def test_a_channel_stays_chosen_until_it_has_less_than_a_tenth_of_the_loudest(tmp_path, share, chosen):
    sound, silence = noise(1.0, 1), np.zeros(RATE, np.float32)
    quiet = np.concatenate([sound, np.sqrt(share) * sound]).astype(np.float32)
    late = np.concatenate([silence, sound])
    samples, _ = read(stereo_file(tmp_path, quiet, -quiet, late, -late, **FLOAT))
    np.testing.assert_array_equal(samples[:RATE], sound)
    np.testing.assert_array_equal(samples[RATE:], (quiet, -quiet, late)[chosen][RATE:])


def test_of_channels_that_cancel_the_first_of_the_loudest_is_used_throughout(tmp_path):
    sound = noise(1.0, 1)
    for first, second, chosen in ((0.85, -1.0, 1), (0.97, -1.0, 0), (1.0, -0.97, 0)):
        samples, _ = read(stereo_file(tmp_path, first * sound, second * sound, **FLOAT))
        np.testing.assert_array_equal(samples, np.float32((first, second)[chosen]) * sound)
    louder = np.concatenate([0.97 * sound, sound])
    quieter = np.concatenate([sound, 0.85 * sound])
    samples, _ = read(stereo_file(tmp_path, quieter, -louder, **FLOAT))
    np.testing.assert_array_equal(samples, quieter)


def test_opposite_phase_above_2_khz_is_ignored(tmp_path):
    t = np.arange(RATE) / RATE
    speech, high = 0.1 * np.sin(2 * np.pi * 500 * t), 0.8 * np.sin(2 * np.pi * 4000 * t)
    samples, warnings = read(stereo_file(tmp_path, speech + high, speech - high))
    np.testing.assert_allclose(samples, speech, atol=1e-4)
    assert not any("cancel" in sentence for sentence in warnings)


def test_channels_at_a_low_rate_are_compared(tmp_path):
    left = waveform(1.0)
    assert "channels cancel" in read(stereo_file(tmp_path, left, -left, rate=2000))[1][0]


@pytest.mark.parametrize(("height", "audible"), [(6.5e-6, False), (7.6e-6, True)])
def test_channels_are_compared_where_they_are_audible(tmp_path, height, audible):
    left = np.tile(np.repeat(np.float32([height, -height]), 4), RATE // 8)  # neighbours at 4 kHz differ by 2 heights
    samples, _ = read(stereo_file(tmp_path, left, -left, **FLOAT))
    np.testing.assert_array_equal(samples, left if audible else 0 * left)


@pytest.mark.filterwarnings("error")
def test_silent_channels_are_averaged_without_a_warning(tmp_path):
    for count in (3, RATE):
        samples, warnings = read(stereo_file(tmp_path, *np.zeros((2, count), np.float32)))
        assert not samples.any() and len(samples) == count and not warnings


def test_channels_that_cancel_for_a_hundredth_of_the_sound_are_reported():
    mixer = Mixer(2, RATE, 0)
    mixer.cancelled, mixer.total = 1.0, 100.0
    assert mixer.warnings() == []
    mixer.cancelled = 1.5
    assert mixer.warnings() == ["its channels cancel each other out (opposite phase); only the loudest is used there"]


def test_channels_that_cancel_where_it_is_quiet_are_not_reported(tmp_path):
    left = waveform(1.0)
    halves = [np.concatenate([0.01 * sign * left, left]) for sign in (1, -1)]
    assert read(stereo_file(tmp_path, *halves))[1] == []


def test_a_warning_on_channels_is_given_once(tmp_path):
    left = waveform(1.0)
    data = encoded(np.stack([left, -left], 1), **WAV)
    assert len(read(put(tmp_path, data + data))[1]) == 1


def whole_numbers(folder, loud: list[float], count: int = 10_000, quiet: float = 4.0):
    """Write a file of `count` floating-point samples, or more: `loud`, then `quiet`."""
    samples = np.full(max(count, len(loud)), quiet, np.float32)
    samples[::2] *= -1
    samples[: len(loud)] = loud
    return put(folder, encoded(samples, **FLOAT))


@pytest.mark.parametrize(("loud", "scaled"), [
    ([100.0] + 99 * [5.0], False), ([100.0] + 100 * [5.0], True), ([99.0] + 100 * [5.0], False),
])  # fmt: skip
def test_integers_are_recognised_by_one_in_a_hundred_above_4_and_one_of_100(tmp_path, loud, scaled):
    path = whole_numbers(tmp_path, loud)
    assert any("16-bit numbers" in sentence for sentence in read(path)[1]) == scaled


def test_zeros_do_not_count_as_integers(tmp_path):
    path = whole_numbers(tmp_path, 150 * [-100.0] + 5000 * [0.0])
    assert any("16-bit numbers" in sentence for sentence in read(path)[1])


@pytest.mark.parametrize(("peak", "bits"), [(2.0**17, 16), (2.01**17, 24), (2.0**25, 24), (2.01**25, 32),
                                            (2.0**33, 32)])  # fmt: skip
def test_integers_are_divided_by_the_full_scale_of_their_bits(tmp_path, peak, bits):
    samples, warnings = read(whole_numbers(tmp_path, 200 * [peak]))
    assert warnings[0].endswith(f": its samples are {bits}-bit numbers stored as floating point; "
                                f"they were divided by {2 ** (bits - 1)}")  # fmt: skip
    assert samples[:200].tolist() == 200 * [np.float32(peak) / 2 ** (bits - 1)]


def test_a_recording_read_in_parts_is_searched_once(tmp_path, monkeypatch):
    path = whole_numbers(tmp_path, RATE * [2.0**15])
    calls, search = [], audio.unscaled_integer_bits
    monkeypatch.setattr(audio, "unscaled_integer_bits", lambda sound: calls.append(sound) or search(sound))
    parts = [load_utterance(Utterance("x", path, None, 0.25, start, True), RATE) for start in (0.0, 0.25, 0.5)]
    assert len(calls) == 1 and all((part[100:200] == 1.0).all() for part in parts)
    whole_numbers(tmp_path, 2 * RATE * [0.5])
    assert load_utterance(Utterance("x", path, None, 0.25, 0.25, True), RATE)[100] == 0.5 and len(calls) == 2


def test_numbers_beyond_32_bits_are_not_audio(tmp_path):
    assert "enormous" in refusal(whole_numbers(tmp_path, 200 * [2.1**33]))


def test_integers_are_searched_for_in_all_of_a_long_recording(tmp_path):
    samples = np.full(2_200_000, 0.5, np.float32)
    samples[1_400_000:] = 1000.0
    with soundfile.SoundFile(tmp_path / "x.wav", "w", RATE, 1, subtype="FLOAT") as file:
        file.write(samples)
    part = load_audio(tmp_path / "x.wav", RATE, start=100.0, seconds=0.1)
    assert part[0] == np.float32(1000 / 32768)


@pytest.mark.parametrize("sign", [1, -1])
def test_samples_up_to_a_million_are_accepted(tmp_path, sign):
    samples = waveform(0.1)
    samples[7] = sign * 1e6
    path = put(tmp_path, encoded(samples, **FLOAT))
    assert np.abs(load_audio(path, RATE)).max() == 1e6
    samples[7] = sign * 1.001e6
    assert "enormous" in refusal(put(tmp_path, encoded(samples, **FLOAT)))


@pytest.mark.parametrize(("flats", "warned"), [(20, False), (21, True)])
def test_a_recording_is_clipped_if_2_of_1000_samples_repeat_the_peak(tmp_path, flats, warned):
    assert clipping(tmp_path, 0.9, flats) == ([f"{flats / 100:.1f}% of its samples"] if warned else [])
    assert clipping(tmp_path, -0.9, 50) == ["0.5% of its samples"]


@pytest.mark.parametrize(("height", "peak", "warned"), [(0.5, 0.5, False), (0.51, 0.51, True), (0.6, 0.7, False),
                                                      (0.89, 0.9, True)])  # fmt: skip
def test_samples_count_as_clipped_near_the_peak_and_above_half_scale(tmp_path, height, peak, warned):
    assert bool(clipping(tmp_path, height, 50, peak)) == warned


def clipping(folder, height: float, flats: int, peak: float = 0.0) -> list[str]:
    """Read 10,000 samples, 1 + flats in a row at this height; return the shares that clipping warnings state."""
    samples = 0.4 * np.tile(np.float32([1, -1]), 5000)
    samples[10 : 11 + flats] = height
    samples[9000] = peak
    sentences = read(put(folder, encoded(samples, **FLOAT)))[1]
    return [sentence.split(": ")[1].removesuffix(" are at the top of the scale") for sentence in sentences
            if "is clipped" in sentence]  # fmt: skip


def test_the_loudest_block_sets_the_level_of_a_recording(tmp_path):
    loud, quiet = waveform(1.0), waveform(1.0) / 1000
    for parts in ((loud, quiet), (quiet, loud)):
        assert not read(put(tmp_path, encoded(np.concatenate(parts), **FLOAT)))[1]


@pytest.mark.parametrize(("peak", "level"), [(0.006, None), (0.0039, "-48 dB"), (0.002, "-54 dB")])
def test_a_recording_is_very_quiet_below_four_thousandths(tmp_path, peak, level):
    samples = waveform(0.5)
    warnings = read(put(tmp_path, encoded(peak / np.abs(samples).max() * samples, **FLOAT)))[1]
    assert len(warnings) == bool(level)
    assert all(
        sentence.endswith(f"is very quiet: its loudest sample is {level} of full scale") for sentence in warnings
    )


@pytest.mark.filterwarnings("error")
def test_silence_gives_no_warning(tmp_path):
    for count in (300, RATE):
        assert read(put(tmp_path, encoded(np.zeros(count, np.float32), **WAV)))[1] == []


def narrow(count: int) -> np.ndarray:
    t = np.arange(count) / RATE
    return (0.3 * np.sin(2 * np.pi * 1000 * t) + 0.3 * np.sin(2 * np.pi * 1700 * t)).astype(np.float32)


@pytest.mark.parametrize(("count", "warned"), [(511, False), (512, True), (1000, True)])
def test_a_recording_of_one_window_can_be_narrow(tmp_path, count, warned):
    warnings = read(put(tmp_path, encoded(narrow(count), **FLOAT)))[1]
    assert [sentence.split("; ")[1] for sentence in warnings] == ["the model was trained on a band of 8 kHz"] * warned


@pytest.mark.parametrize(("rate", "compared"), [(8000, False), (14_999, False), (15_000, True)])
def test_the_band_is_judged_for_models_of_more_than_telephone_bandwidth(rate, compared):
    quality = SignalQuality(rate)
    quality.add(narrow(1024))
    assert (quality.low > 0) == compared


def test_the_speech_band_is_compared_with_the_band_above_a_telephones():
    quality = SignalQuality(RATE)
    hertz = np.fft.rfftfreq(512, 1 / RATE)
    assert hertz[quality.speech_bins][[0, -1]].tolist() == [312.5, 3375.0] and quality.speech_bins.sum() == 99
    assert hertz[quality.upper_bins][[0, -1]].tolist() == [4406.25, 7593.75] and quality.upper_bins.sum() == 103
    quality, hertz = SignalQuality(25_600), np.fft.rfftfreq(512, 1 / 25_600)  # bins of 50 Hz
    assert hertz[quality.speech_bins][[0, -1]].tolist() == [350, 3350] and hertz[quality.upper_bins][
        [0, -1]
    ].tolist() == [
        4450,
        7550,
    ]


def test_one_wide_block_makes_a_recording_wide():
    quality = SignalQuality(RATE)
    for block in (narrow(RATE), noise(1.0, 0), narrow(RATE)):
        quality.add(block)
    assert quality.warnings() == []
    alone = SignalQuality(RATE)
    alone.add(noise(1.0, 0))
    assert quality.high == pytest.approx(alone.high, rel=1e-3) and quality.low > 10 * alone.low


@pytest.mark.parametrize(("share", "floor", "warned"), [(3.5e-6, 0.0, True), (4.5e-6, 0.0, False), (5.5e-5, 1.0, True),
                                                      (7e-5, 1.0, False), (4.5e-6, 4.5e-6, False)])  # fmt: skip
def test_a_narrow_band_recording_has_a_millionth_of_its_energy_above_the_band(share, floor, warned):
    quality = SignalQuality(RATE)
    quality.low, quality.high, quality.floor = 1.0, share, floor
    assert bool(quality.warnings()) == warned


def test_the_floor_is_three_times_the_energy_of_rounding_to_16_bits():
    quality = SignalQuality(RATE)
    for seed in range(20):
        quality.add(np.random.default_rng(seed).uniform(-0.5, 0.5, RATE) / 32768)
    assert quality.floor / quality.high == pytest.approx(3, rel=0.03)


def test_the_lowest_rate_of_the_returned_blocks_is_reported(tmp_path):
    parts = [encoded(waveform(1.0, seed), rate, **WAV) for seed, rate in enumerate((11_025, 8000, 44_100, 16_000))]
    path = put(tmp_path, b"".join(parts))
    low = read(path)[1]
    assert len(low) == 1 and "is sampled at 8000 Hz, but the model was trained at 16000 Hz" in low[0]
    before = RATE / 11_025 + RATE / 8000 + RATE / 44_100
    assert read(path, start=before + 0.1, seconds=0.5)[1] == []


@pytest.mark.parametrize("rate", [8000, 15_999])
def test_blocks_hold_a_second_and_none_is_empty(tmp_path, rate):
    recording = open_recording(put(tmp_path, encoded(waveform(2.5), rate, **WAV)), RATE)
    lengths = [len(block) for block in recording]
    assert min(lengths) > 0 and max(lengths) <= 2 * RATE and len(lengths) >= 3


def test_blocks_of_many_channels_hold_a_quarter_of_a_million_numbers(tmp_path, monkeypatch):
    sizes, read_sound = [], SoundStream.read
    monkeypatch.setattr(SoundStream, "read", lambda self, out: sizes.append(out.size) or read_sound(self, out=out))
    load_audio(stereo_file(tmp_path, *np.zeros((16, 20_000), np.float32), rate=48_000), RATE)
    assert 2**17 < max(sizes) <= 2**18
