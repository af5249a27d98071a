"""The attention monitor: which attention counts as an alignment, and the advice when there is none."""

import dataclasses
import json
import math

import pytest
import torch

from las_fast.config import (
    AugmentConfig,
    Config,
    DataConfig,
    ListenerConfig,
    ModelConfig,
    TeacherForcingStage,
    TrainingConfig,
)
from las_fast.training import monitor


def bumps(centres, frames, width=0.8):
    """(1, U+1, T) attention with a bump at each centre, and <eos> at frame 0."""
    centres = torch.cat([torch.as_tensor(centres, dtype=torch.float32), torch.zeros(1)])
    position = torch.arange(frames, dtype=torch.float32)
    return (-(position - centres[:, None]).square() / (2 * width**2)).softmax(-1)[None]


def measure(weights):
    return monitor.measure(weights, torch.tensor([weights.shape[1]]), torch.tensor([weights.shape[2]]))


def diagonal(frames=60, tokens=25, start=0.0, end=1.0):
    return torch.linspace(start * (frames - 1), end * (frames - 1), tokens)


@pytest.mark.parametrize("frames, tokens", [(20, 25), (60, 25), (400, 110), (60, 4)])
def test_a_diagonal_is_formed(frames, tokens):
    alignment = measure(bumps(diagonal(frames, tokens), frames))
    assert alignment.formed, alignment
    assert alignment.diagonal > 0.99 and alignment.monotonic == 1


def test_a_diagonal_with_silence_pauses_and_rate_changes_is_formed():
    fast, slow = torch.linspace(12, 26, 16), torch.linspace(38, 70, 14)  # frames 0-11, 27-37, 71-79 are silent
    assert measure(bumps(torch.cat([fast, slow]), 80)).formed


def test_a_diagonal_with_small_backward_steps_is_formed():
    centres = diagonal(100, 40)
    centres[1::4] -= 3
    assert measure(bumps(centres, 100)).formed


def test_uniform_attention_is_not_formed():
    alignment = measure(torch.full((1, 26, 60), 1 / 60))
    assert not alignment.formed
    assert abs(alignment.sharp) < 1e-4 and abs(alignment.diagonal) < 1e-3


@pytest.mark.parametrize("frame", [0, 30, 59])
def test_sharp_attention_to_one_frame_is_not_formed(frame):
    alignment = measure(bumps(torch.full((25,), float(frame)), 60))
    assert alignment.sharp > 0.9
    assert {"diagonal", "coverage"} <= set(alignment.failing())


def test_sharp_attention_in_random_order_is_not_formed():
    generator = torch.Generator().manual_seed(1)
    alignment = measure(bumps(torch.randint(0, 60, (25,), generator=generator), 60))
    assert alignment.sharp > 0.9
    assert {"diagonal", "monotonic"} <= set(alignment.failing())


def test_attention_mostly_at_the_end_is_not_formed():
    assert not measure(bumps(torch.cat([torch.tensor([0.0, 20.0, 40.0]), torch.full((22,), 58.0)]), 60)).formed


def test_a_diagonal_over_a_third_of_the_utterance_is_not_formed():
    assert measure(bumps(diagonal(end=0.33), 60)).failing() == ["coverage"]


def by_hand(weights, tokens, frames):
    """The four numbers of one utterance, by the definitions in the module's docstring."""
    w = weights[:tokens, :frames] / weights[:tokens, :frames].sum(1, keepdim=True)
    attended, index = w @ torch.arange(float(frames)), torch.arange(float(tokens))
    attended, index = attended - attended.mean(), index - index.mean()
    spread = max(float(attended.square().sum()), 0.01 * tokens)
    peaks, t = w.argmax(1), torch.arange(frames)
    sharp = []
    for u in range(tokens):
        near = (t - peaks[u]).abs() <= 2
        chance = float(near.float().mean())
        sharp.append((float(w[u][near].sum()) - chance) / (1 - chance))
    max_step = max(frames / 4, 2 * frames / tokens, 5)
    moves = peaks.diff().tolist()
    reach = max(0.75 * frames / tokens, 2)
    seen = [min(abs(int(p) - i) for p in peaks) <= reach for i in range(frames)]
    return (
        float((attended * index).sum()) / math.sqrt(spread * float(index.square().sum())),
        sum(sharp) / tokens,
        sum(-2 <= move <= max_step for move in moves) / (tokens - 1),
        sum(seen) / frames,
    )


# (characters, frames) of each utterance; the last two are too short to be measured
SIZES = [(12, 40), (3, 8), (25, 60), (4, 57), (3, 60), (7, 9), (2, 60), (12, 7)]


def utterances_of_many_kinds(seed):
    torch.manual_seed(seed)
    longest = max(n for n, _ in SIZES) + 1, max(t for _, t in SIZES)
    weights = torch.rand(len(SIZES), *longest) * 5  # values past the lengths are ignored
    for row, (tokens, frames) in enumerate(SIZES):
        centres = torch.linspace(0, frames - 1, tokens) + 4 * torch.randn(tokens) * (row % 3)
        weights[row, : tokens + 1, :frames] = bumps(centres.clamp(0, frames - 1), frames, width=0.8 + row / 4)[0]
    return weights, torch.tensor([n + 1 for n, _ in SIZES]), torch.tensor([t for _, t in SIZES])


@pytest.mark.parametrize("seed", range(4))
def test_the_numbers_of_a_padded_batch_equal_their_definitions(seed):
    weights, token_lengths, lengths = utterances_of_many_kinds(seed)
    alignment = monitor.measure(weights, token_lengths, lengths)
    expected = [by_hand(w, n, t) for w, (n, t) in zip(weights, SIZES, strict=True) if n >= 3 and t >= 8]
    assert alignment.utterances == len(expected) == 6
    for name, values in zip(monitor.SHAPE_THRESHOLDS, zip(*expected, strict=True), strict=True):
        assert getattr(alignment, name) == pytest.approx(sum(values) / len(values), abs=1e-5), name


def test_steps_count_up_to_their_exact_limits():
    slow = torch.arange(20.0, 31.0)  # eleven characters of one frame each, and a twelfth after a step of `move`
    for move, good in ((-2, 11), (-3, 10), (15, 11), (16, 10)):  # over 60 frames: at most 2 back, or a quarter forward
        alignment = measure(bumps(torch.cat([slow, slow[-1:] + move]), 60, width=0.1))
        assert alignment.monotonic == pytest.approx(good / 11), move
    for move, good in ((24, 3), (25, 2)):  # or twice the frames of an average token, if that is more
        alignment = measure(bumps(torch.tensor([20.0, 21.0, 22.0, 22.0 + move]), 48, width=0.1))
        assert alignment.monotonic == pytest.approx(good / 3), move


def test_batches_are_averaged_by_their_utterances():
    one, three = monitor.Alignment(0.2, 0.4, 0.6, 0.8, 1), monitor.Alignment(1.0, 0.8, 0.4, 0.0, 3)
    both = monitor.combine([one, three, monitor.Alignment(0.0, 0.0, 0.0, 0.0, 0)])
    assert (both.diagonal, both.sharp, both.monotonic, both.coverage) == pytest.approx((0.8, 0.7, 0.45, 0.2))
    assert both.utterances == 4 and monitor.combine([one]) == one


def test_each_number_counts_from_its_threshold_on():
    for name, threshold in monitor.THRESHOLDS.items():
        values = {**monitor.THRESHOLDS, "utterances": 1}
        assert monitor.Alignment(**values).formed and monitor.Alignment(**values).failing() == []
        below = monitor.Alignment(**values | {name: threshold - 1e-6})
        assert below.failing() == [name] and not below.formed
    assert not monitor.Alignment(**monitor.THRESHOLDS | {"utterances": 0}).formed


def test_a_broad_diagonal_is_not_formed():
    assert measure(bumps(diagonal(100, 40), 100, width=15)).failing() == ["sharp"]


def test_a_reversed_diagonal_is_not_formed():
    alignment = measure(bumps(diagonal().flip(0), 60))
    assert alignment.diagonal < -0.99 and not alignment.formed


def test_eos_may_attend_anywhere():
    weights = bumps(diagonal(), 60)
    elsewhere = weights.clone()
    elsewhere[0, -1] = torch.eye(60)[30]
    assert measure(weights) == measure(elsewhere)


def test_padding_is_ignored():
    alone = bumps(diagonal(), 60)
    padded = torch.rand(2, 40, 90)
    padded[0, :26, :60] = alone[0]
    padded[1] = bumps(diagonal(90, 39), 90)[0]
    alignment = monitor.measure(padded, torch.tensor([26, 40]), torch.tensor([60, 90]))
    apart = monitor.combine([measure(alone), measure(padded[1:])])
    assert vars(alignment) == pytest.approx(vars(apart), abs=1e-6)
    assert alignment.utterances == 2


def test_utterances_too_short_to_measure_are_excluded():
    weights = torch.cat([bumps(diagonal(), 60), torch.full((3, 26, 60), 1 / 60)])
    alignment = monitor.measure(weights, torch.tensor([26, 2, 3, 1]), torch.full((4,), 60))
    assert alignment.utterances == 1 and alignment.formed
    none = monitor.measure(weights, torch.tensor([1, 2, 3, 0]), torch.tensor([60, 60, 60, 0]))
    assert none.utterances == 0 and not none.formed
    assert "not measured" in monitor.status_line(none, 3, Config())
    assert monitor.combine([none, none]) == none
    assert monitor.combine([none, alignment]) == alignment


def test_the_line_says_formed_with_the_numbers():
    line = monitor.status_line(measure(bumps(diagonal(), 60)), 2, Config())
    assert line.startswith("attention: formed (diagonal 1.00, sharp 1.00")
    assert "\n" not in line


def test_a_diagonal_that_ignores_the_audio_is_not_formed():
    shape = measure(bumps(diagonal(), 60))
    ignoring_audio, using_audio = (dataclasses.replace(shape, audio_gain=gain) for gain in (0.02, 2.0))
    assert shape.formed and not ignoring_audio.formed and using_audio.formed
    line = monitor.status_line(ignoring_audio, 4, Config())
    assert "audio gain 0.02 below 0.5" in line and "not formed yet" in line
    assert "audio gain 2.00" in monitor.status_line(using_audio, 4, Config())


@pytest.mark.parametrize("name", monitor.THRESHOLDS)
def test_nan_is_below_every_threshold(name):
    good = dataclasses.replace(measure(bumps(diagonal(), 60)), audio_gain=2.0)
    wrong = dataclasses.replace(good, **{name: float("nan")})
    assert (
        good.formed
        and not wrong.formed
        and f"{name.replace('_', ' ')} nan below" in monitor.status_line(wrong, 4, Config())
    )


def test_a_number_just_below_its_threshold_is_rounded_down():
    short = dataclasses.replace(measure(bumps(diagonal(), 60)), diagonal=0.7999)
    assert "diagonal 0.79 below 0.8" in monitor.status_line(short, 4, Config())


def test_before_the_deadline_the_line_gives_no_advice():
    line = monitor.status_line(measure(torch.full((1, 26, 60), 1 / 60)), 2, Config())
    assert "not formed yet" in line and "epoch 10" in line and "--" not in line
    assert "sharp 0.00 below 0.5" in line


def test_the_status_line_has_its_exact_text():
    good = monitor.Alignment(0.9, 0.85, 0.8, 0.75, 4, audio_gain=1.5)
    weak, config = dataclasses.replace(good, sharp=0.4567), Config(training=TrainingConfig(monitor_epoch=6.0))
    numbers = "diagonal 0.90, sharp 0.85, monotonic 0.80, coverage 0.75"
    assert monitor.status_line(good, 2, config) == f"attention: formed ({numbers}, audio gain 1.50)"
    assert (
        monitor.status_line(dataclasses.replace(good, audio_gain=None), 2, config) == f"attention: formed ({numbers})"
    )
    numbers = "diagonal 0.90, sharp 0.45 below 0.5, monotonic 0.80, coverage 0.75, audio gain 1.50"
    assert monitor.status_line(weak, 5.9, config) == f"attention: not formed yet ({numbers}); expected by epoch 6"
    late = monitor.status_line(weak, 6.0, config)
    assert late.startswith(f"attention: not formed by epoch 6 ({numbers}). Try in new runs, in this order: 1. ")
    assert "; 2. " in late and late.endswith("longer training: --training.epochs 120")
    none = monitor.Alignment(0.0, 0.0, 0.0, 0.0, 0)
    assert monitor.status_line(none, 9, config).startswith(
        "attention: not measured, since no dev utterance has 3 characters and 8"
    )


def training(**fields) -> Config:
    return Config(model=ModelConfig(ctc_layer=fields.pop("ctc_layer", 1)), training=TrainingConfig(**fields))


def listener(pyramids, strides=(1,)) -> Config:
    sizes = {"conv_channels": (8,) * len(strides), "conv_kernels": (3,) * len(strides)}
    return Config(model=ModelConfig(listener=ListenerConfig(**sizes, conv_strides=strides, pyramids=pyramids)))


@pytest.mark.parametrize(
    ("step", "epoch", "config", "message"),
    [
        ("guided_loss", 4, training(guided_weight=3, guided_until=7), "for longer: --training.guided-until 10 (now 7)"),
        (
            "guided_loss",
            6,
            training(guided_weight=3, guided_until=11),
            "for longer: --training.guided-until 12 (now 11)",
        ),
        ("guided_loss", 5, training(guided_weight=3, guided_until=10), None),
        ("guided_loss", 5, training(guided_weight=2, guided_until=10), "--training.guided-weight 3 (now 2)"),
        ("guided_loss", 5, training(guided_weight=1, guided_frames=8, guided_until=10, ctc_weight=1), None),
        (
            "guided_loss",
            5,
            training(guided_weight=0, guided_frames=8, ctc_weight=1),
            "--training.guided-weight 1 (now 0)",
        ),
        ("guided_loss", 5, training(guided_weight=0), "guided attention loss: --training.guided-weight 3 (now 0)"),
        (
            "guided_loss",
            3,
            training(ctc_weight=1, guided_until=5),
            "guided-weight 1 --training.guided-until 10 (now 0)",
        ),
        ("guided_loss", 5, training(ctc_weight=1, guided_until=10), "--training.guided-weight 1 (now 0)"),
        ("ctc", 5, training(ctc_layer=-1), "--model.ctc-layer 2 --training.ctc-weight 0.3 (now none)"),
        ("ctc", 5, listener(1), "--model.ctc-layer 0 --training.ctc-weight 0.3 (now none)"),
        ("ctc", 5, listener(0), "--model.ctc-layer 0 --training.ctc-weight 0.3 (now none)"),
        ("ctc", 5, training(ctc_layer=0, ctc_weight=0), "CTC on the listener: --training.ctc-weight 0.3 (now 0)"),
        ("ctc", 5, training(ctc_weight=0.3, ctc_until=5), "CTC for longer: --training.ctc-until 0 (now 5)"),
        ("ctc", 5, training(ctc_weight=1, ctc_until=6), None),
        ("ctc", 5, training(ctc_weight=0.9), "a stronger CTC: --training.ctc-weight 1 (now 0.9)"),
        ("ctc", 5, training(ctc_weight=1.0), None),
        ("short_utterances", 5, Config(data=DataConfig(short_epochs=1)), None),
        ("short_utterances", 5, Config(), "--data.short-epochs 10 (now 0)"),
        ("teacher_forcing", 20, Config(), None),
        ("teacher_forcing", 30, Config(), "(now 0.90)"),
        ("later_masks", 4, Config(augment=AugmentConfig(start_epoch=4)), "--augment.start-epoch 10 (now 4)"),
        ("later_masks", 6, Config(augment=AugmentConfig(start_epoch=4)), "--augment.start-epoch 12 (now 4)"),
        ("later_masks", 3.9, Config(augment=AugmentConfig(start_epoch=4)), None),
        ("later_masks", 6, Config(augment=AugmentConfig(time_masks=0, frequency_masks=0)), None),
        ("later_masks", 6, Config(augment=AugmentConfig(time_masks=0, frequency_masks=1)), "(now 0)"),
        ("less_reduction", 5, listener(3), "--model.listener.pyramids 2 (now 3, 8 feature frames per encoder frame)"),
        ("less_reduction", 5, listener(2), None),
        (
            "less_reduction",
            5,
            listener(1, (2, 2)),
            "--model.listener.pyramids 0 (now 1, 8 feature frames per encoder frame)",
        ),
        ("less_reduction", 5, listener(0, (2, 4)), None),
        (
            "smaller_batches",
            5,
            Config(data=DataConfig(utterances_per_batch=16)),
            "--data.utterances-per-batch 8 (now 16)",
        ),
        ("smaller_batches", 5, Config(data=DataConfig(utterances_per_batch=15)), None),
    ],
)
def test_each_advice_is_given_where_it_applies_and_only_there(step, epoch, config, message):
    advice = getattr(monitor, f"_advise_{step}")(epoch, config)
    assert advice is None if message is None else advice.endswith(message), advice


def test_after_the_deadline_the_advice_comes_in_order():
    line = monitor.status_line(measure(torch.full((1, 26, 60), 1 / 60)), 25, Config())
    wanted = ["guided-weight 3", "ctc-layer 2", "short-epochs 10", "teacher_forcing", "augment.start-epoch 50",
              "pyramids 2", "utterances-per-batch 32", "training.epochs 120"]  # fmt: skip
    positions = [line.index(word) for word in wanted]
    assert positions == sorted(positions)
    assert "now 0.95" in line  # teacher forcing at epoch 25 of the default stages


def test_enabled_settings_are_not_advised():
    config = Config(
        data=DataConfig(utterances_per_batch=8, short_epochs=5),
        augment=AugmentConfig(start_epoch=90),
        model=ModelConfig(listener=ListenerConfig(pyramids=2), ctc_layer=1),
        training=TrainingConfig(guided_weight=1, guided_frames=8, guided_until=40, ctc_weight=1.0, teacher_forcing=(),
                                epochs=30),
    )  # fmt: skip
    assert monitor.advice(10, config) == ["longer training: --training.epochs 60"]


def test_weak_or_short_settings_are_advised_stronger_or_longer():
    stage = TeacherForcingStage(start=5, end=10, first=1, last=0.5)
    config = Config(
        model=ModelConfig(ctc_layer=1),
        training=TrainingConfig(guided_weight=0.5, guided_until=5, guided_frames=8, ctc_weight=0.3,
                                teacher_forcing=(stage,)),
    )  # fmt: skip
    text = "; ".join(monitor.advice(12, config))
    assert "--training.guided-until 24 (now 5)" in text
    assert "--training.ctc-weight 1 (now 0.3)" in text
    assert "now 0.50" in text
    faded = dataclasses.replace(config, training=dataclasses.replace(config.training, ctc_until=6.0, guided_until=50))
    assert "--training.ctc-until 0 (now 6)" in "; ".join(monitor.advice(12, faded))
    assert "--training.guided-weight 1 (now 0.5)" in "; ".join(monitor.advice(12, faded))


@pytest.mark.parametrize(("weight", "now"), [(0.0, "now 0"), (3.0, "now along the diagonal")])
def test_with_a_ctc_loss_the_first_advice_is_to_guide_the_attention_by_it(weight, now):
    config = Config(model=ModelConfig(ctc_layer=1), training=TrainingConfig(guided_weight=weight, ctc_weight=1.0))
    first = monitor.advice(12, config)[0]
    assert "--training.guided-frames 8 --training.guided-weight 1 --training.guided-until 24" in first and now in first
    assert "guided-until" not in monitor.advice(4, config)[0]


def test_an_alignment_can_be_logged_as_json():
    alignment = dataclasses.asdict(measure(bumps(diagonal(), 60)))
    assert json.loads(json.dumps(alignment))["formed"] is True
    assert set(alignment) == {*monitor.THRESHOLDS, "utterances", "formed"}


def test_texts_with_a_fault_get_advice():
    config = dataclasses.replace(Config(), training=dataclasses.replace(Config().training, monitor_epoch=6.0))
    good, weak = monitor.Alignment(0.9, 0.8, 0.9, 0.6, 5, 1.5), monitor.Alignment(0.1, 0.1, 0.1, 0.1, 5, 0.1)
    fault = "9 of 9 texts are blank"
    assert monitor.status_line(weak, 2, config, fault).endswith(
        "; expected by epoch 6; until then such texts are usual"
    )
    assert monitor.status_line(weak, 6, config, fault) == monitor.status_line(weak, 6, config)
    line = monitor.status_line(good, 2, config, fault)
    assert line.endswith(f", but {fault}: train longer; if it stays so, decode with a wider --beam")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, ctc_layer=0))
    assert "decode with --decoding.ctc-weight 0.3" in monitor.status_line(good, 2, config, fault)
