"""Interfaces between modules: each passes the right values to the next, and every setting takes effect."""

import csv
import json
import math
import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_checkpoints import MODEL, make_checkpoint, make_trainer, small
from tiny_corpora import make_archive, make_manifest, make_speech, write_audio

from las_fast import checkpoint, decode, export, lm, train, transcribe, tune
from las_fast.config import Config, DataConfig, DecodingConfig, FeatureConfig, TrainingConfig
from las_fast.data.batch_plan import sorted_batches
from las_fast.data.cache import open_cache
from las_fast.data.dataset import load_dataset
from las_fast.data.features import add_deltas
from las_fast.data.layouts import open_corpus
from las_fast.data.normalisation import Statistics
from las_fast.errors import InputError
from las_fast.files import AVERAGED, BEST
from las_fast.model.las import LAS
from las_fast.output.metrics import Scores
from las_fast.search import ngram
from las_fast.text import EOS
from las_fast.training import step as step_module
from las_fast.training import trainer as trainer_module
from las_fast.training.losses import token_loss
from las_fast.training.monitor import Alignment
from las_fast.training.resume import check_same_settings, fingerprint
from las_fast.training.runlog import RunLog
from las_fast.training.trainer import Trainer
from las_fast.training.validate import Validation, validate
from las_fast.tree import to_tree

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return make_archive(tmp_path_factory.mktemp("seams"), "F23", utterances=5)


def first_batch(trainer: Trainer):
    return next(iter(trainer._rest_of_epoch()))


# ------------------------------------------------------------------------------------------------------- training


def test_the_dev_set_of_a_training_is_normalised_by_the_training_set(archive):
    ours, dev = train.load_data(small(features=FeatureConfig(size=28, normalisation="global")), open_corpus(archive))
    statistics = ours.statistics
    assert dev.statistics is statistics
    torch.testing.assert_close(dev[0], (dev.raw(0) - statistics.mean) / statistics.std)


def test_the_dev_set_of_a_training_is_complete(archive):
    data = replace(small().data, max_seconds=0.35, hours=0.5 / 3600)
    ours, dev = train.load_data(small(data=data), open_corpus(archive))
    assert len(ours) < 5 and len(dev) == 5


def steps_from_the_same_weights(trainer: Trainer, count: int, same=lambda trainer: None) -> list[float]:
    """The losses of steps that all start from the same weights, on the same batch."""
    batch, weights = first_batch(trainer), {k: v.clone() for k, v in trainer.model.state_dict().items()}
    losses = []
    for _ in range(count):
        trainer.model.load_state_dict(weights)
        same(trainer)
        losses.append(float(trainer.train_step(batch)["loss"]))
    return losses


def test_each_step_draws_its_own_dropout(archive, tmp_path):
    trainer = make_trainer(archive, tmp_path, small())
    first, second = steps_from_the_same_weights(trainer, 2)
    assert first != second

    def at_step_one(trainer):
        trainer.progress.step = 1

    again = steps_from_the_same_weights(make_trainer(archive, tmp_path, small()), 2, at_step_one)
    assert again[0] == again[1] == second


def test_gradients_do_not_accumulate_over_steps(archive, tmp_path):
    trainer = make_trainer(archive, tmp_path, small())
    batch, weights = first_batch(trainer), {k: v.clone() for k, v in trainer.model.state_dict().items()}
    norms = []
    for _ in range(3):
        trainer.model.load_state_dict(weights)
        trainer.progress.step = 0
        actual = trainer.train_step(batch)
        norms.append(float(actual["gradient_norm"]))
        assert not actual["loss"].requires_grad and set(actual) == {"loss", "attention", "gradient_norm"}
    assert norms[0] == norms[1] == norms[2]


def test_the_seed_reaches_dropout(archive, tmp_path):
    losses = []
    for seed in (1, 2):
        trainer = make_trainer(archive, tmp_path, small())
        trainer.config = replace(trainer.config, training=replace(trainer.config.training, seed=seed))
        losses += steps_from_the_same_weights(trainer, 1)
    assert losses[0] != losses[1]


def test_each_step_draws_its_own_sampled_tokens(archive, tmp_path):
    still = replace(MODEL, listener=replace(MODEL.listener, dropout=0.0), speller=replace(MODEL.speller, dropout=0.0))
    half = TrainingConfig(epochs=2, precision="fp32", teacher_forcing=(train_stage(0.5),))
    trainer = make_trainer(archive, tmp_path, small(model=still, training=half))
    first, second = steps_from_the_same_weights(trainer, 2)
    assert first != second


def test_every_loss_setting_reaches_each_step(archive, tmp_path, monkeypatch):
    training = TrainingConfig(
        epochs=20, precision="fp32", label_smoothing=0.07, ctc_weight=0.4, ctc_until=1.5, guided_weight=2.0,
        guided_until=4.0, guided_width=0.2, guided_frames=3.0, teacher_forcing=(train_stage(0.75),), learning_rate=0.5,
        warmup_steps=4,
    )  # fmt: skip
    trainer = make_trainer(archive, tmp_path, small(model=replace(MODEL, ctc_layer=0), training=training))
    losses, forcing, loss, forward = [], [], step_module.training_loss, LAS.forward
    spy = lambda *args, **options: losses.append(options) or loss(*args, **options)  # noqa: E731
    monkeypatch.setattr(step_module, "training_loss", spy)
    monkeypatch.setattr(LAS, "forward", lambda self, *args: forcing.append(args[3]) or forward(self, *args))
    batch, per_epoch = first_batch(trainer), trainer.curriculum.steps_before(1)
    for step, ctc, guided, rate in ((0, 0.4, 2.0, 0.125), (per_epoch, 0.4, 1.5, 0.5), (2 * per_epoch, 0.0, 1.0, None)):
        trainer.progress.step = step
        trainer.train_step(batch)
        assert losses[-1] == {"label_smoothing": 0.07, "ctc_weight": ctc, "guided_weight": pytest.approx(guided),
                              "guided_width": 0.2, "guided_frames": 3.0}  # fmt: skip
        assert (
            rate is None or trainer.optimiser.param_groups[0]["lr"] == trainer.optimiser.param_groups[1]["lr"] == rate
        )
    assert forcing == [0.75] * 3 and per_epoch == 3


def test_the_loader_of_an_epoch_starts_at_the_step(archive, tmp_path, monkeypatch):
    config = small(data=replace(small().data, workers=3), training=replace(small().training, seed=7))
    trainer, seen = make_trainer(archive, tmp_path, config), []
    monkeypatch.setattr(trainer_module, "make_loader", lambda *args, **options: seen.append((args, options)))
    trainer.progress.step = trainer.curriculum.steps_before(1) + 2
    trainer._rest_of_epoch()
    ((data, batches, vocabulary), options) = seen[0]
    assert (
        data is trainer.train_data
        and vocabulary is trainer.vocabulary
        and batches == trainer.curriculum.batches_of(1).epoch(1)
    )
    assert options.pop("augment").config == config.augment
    assert {name: options[name] for name in ("seed", "epoch", "start", "workers")} == {
        "seed": 7, "epoch": 1, "start": 2, "workers": 3
    }  # fmt: skip


@pytest.mark.parametrize(("every", "due"), [(1.0, [3, 6]), (0.5, [2, 3, 5, 6]), (2.0, [6]), (5.0, [6]), (1.5, [5, 6])])
def test_a_validation_is_due_every_validate_every_epochs(archive, tmp_path, every, due):
    trainer = make_trainer(archive, tmp_path, small(training=replace(small().training, validate_every=every)))
    actual = []
    for step in range(1, trainer.steps + 1):
        trainer.progress.step = step
        if trainer.validation_due:
            actual.append(step)
            trainer.progress.validated = step
            assert not trainer.validation_due
    assert trainer.steps == 6 and actual == due


def test_the_settings_reach_the_optimiser():
    config = small(training=replace(small().training, learning_rate=0.25, weight_decay=0.125))
    optimiser = step_module.make_optimiser(checkpoint.build_model(config), config)
    decayed, free = optimiser.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.125, 0.0)
    assert decayed["lr"] == free["lr"] == 0.25 and decayed["betas"] == free["betas"] == (0.9, 0.98)


def test_core_hours_add_up_over_this_process_and_earlier_runs(archive, tmp_path, monkeypatch):
    trainer = make_trainer(archive, tmp_path, small())
    trainer.earlier_core_seconds = 7200.0
    monkeypatch.setattr(trainer_module.time, "process_time", lambda: 1800.0)
    assert trainer.core_hours() == 2.5 and trainer.state()["core_seconds"] == 9000.0
    trainer.save()
    again = make_trainer(archive, tmp_path, small())
    again.resume()
    assert again.earlier_core_seconds == 9000.0 and again.core_hours() == 3.0


def test_a_training_from_before_silence_was_trimmed_resumes_without_trimming(tmp_path):
    now = to_tree(small())
    then = {**now, "features": {key: value for key, value in now["features"].items() if key != "trim_silence"}}
    with pytest.raises(InputError, match="trained with features.trim_silence = False, not True"):
        check_same_settings(then, now, tmp_path)
    check_same_settings(then, {**now, "features": {**now["features"], "trim_silence": False}}, tmp_path)


def test_the_data_fingerprint_covers_ids_lengths_texts_and_their_order():
    def data(ids="ab", frames=(5, 6), texts="XY"):
        return SimpleNamespace(ids=[*ids], frame_counts=np.array(frames), texts=[*texts])

    both = [(data(), data()), (data("ac"), data()), (data(frames=(5, 7)), data()), (data(texts="XZ"), data()),
            (data("ba"), data()), (data(), data("ac"))]  # fmt: skip
    assert len({fingerprint(*one) for one in both}) == len(both)
    assert fingerprint(*both[0]) == fingerprint(data(), data())


def test_a_gradient_is_scaled_to_the_limit_and_left_alone_below_it(archive, tmp_path):
    trainer = make_trainer(archive, tmp_path, small(training=replace(small().training, clip_norm=2.0)))
    for value, factor in ((1.0, 1.0), (2.0, 1.0), (8.0, 0.25)):
        trainer.optimiser.zero_grad(set_to_none=True)
        bias = trainer.model.speller.bias
        bias.grad = torch.zeros_like(bias)
        bias.grad[3] = value
        assert trainer._clip() == value
        assert bias.grad[3] == (value if factor == 1 else pytest.approx(value * factor, rel=1e-5))


def test_the_best_model_is_saved_with_its_training_data_and_scores(archive, tmp_path):
    config = small(
        features=FeatureConfig(size=28, normalisation="global"), training=replace(small().training, epochs=1)
    )
    trainer = make_trainer(archive, tmp_path, config)
    trainer.run()
    for name in (BEST, AVERAGED):
        loaded = checkpoint.load_model(tmp_path / name)
        assert torch.equal(loaded.statistics.mean, trainer.train_data.statistics.mean)
        assert torch.equal(loaded.statistics.std, trainer.train_data.statistics.std)
        info = loaded.info
        assert (info["epoch"], info["step"], info["data"]) == (1.0, 3, {"kind": "features", "name": "HW4P2 F23"})
        assert info["dev"]["cer"] == pytest.approx(trainer.progress.best_cer) and info["dev"]["utterances"] == 5
        averaged = trainer.averaged.state_dict()
        assert all(torch.equal(value, averaged[k]) for k, value in loaded.model.state_dict().items())


def test_a_training_takes_its_threads_and_its_device_from_the_command(archive, tmp_path, monkeypatch):
    threads, trainer = [], []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(Trainer, "run", lambda self: trainer.append(self))
    argv = ["--config", "tiny", "--data", str(archive), "--device", "cpu", "--training.epochs", "2"]
    train.main([*argv, "--out", str(tmp_path / "a"), "--training.threads", "3", "--on-bad", "skip"])
    train.main([*argv, "--out", str(tmp_path / "b"), "--training.threads", "0"])
    assert threads == [3] and [t.device.type for t in trainer] == ["cpu", "cpu"]
    assert [t.config.data.on_bad for t in trainer] == ["skip", "error"]
    assert trainer[0].source == {"kind": "features", "name": "HW4P2 F23"} and trainer[0].out == tmp_path / "a"


def test_a_training_prints_its_size_batches_and_threads(archive, tmp_path, monkeypatch, capsys):
    trainer = make_trainer(archive, tmp_path, small())
    trainer.progress.step = 2
    parameters = sum(p.numel() for p in trainer.model.parameters())
    monkeypatch.setattr(train, "cores", lambda: 4)
    for threads, more in ((3, True), (4, False)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        capsys.readouterr()
        train.print_summary(trainer)
        printed = capsys.readouterr().out
        size = f"model: {parameters / 1e6:.1f} M parameters, float32 on cpu"
        padding = 100 * trainer.curriculum.batches_of(1).padding_share(0, frame_multiple=32)
        batches = f"3 batches per epoch, {padding:.1f}% padding"
        assert printed.startswith(f"{size}; {batches}; from step 2 to 6\n")
        assert ("\nthreads: 3 of 4 cores; if the others are idle" in printed) == ("threads:" in printed) == more
    trainer.device = torch.device("cuda")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    train.print_summary(trainer)
    assert "threads" not in capsys.readouterr().out


def test_a_stopped_training_prints_how_to_resume_or_restart(archive, tmp_path):
    trainer = make_trainer(archive, tmp_path, small())
    assert "before anything was saved; start again" in train.resume_hint(trainer, ["--out", "x"])
    trainer.saved_step = 7
    for argv in (["--out", "a b"], ["--out", "a b", "--resume"]):
        printed = train.resume_hint(trainer, argv)
        assert "step 7 is saved" in printed and printed.endswith("python -m las_fast.train --out 'a b' --resume")


def train_stage(rate: float):
    from las_fast.config import TeacherForcingStage

    return TeacherForcingStage(start=0.0, end=9.0, first=rate, last=rate)


def test_a_step_whose_gradient_is_not_finite_is_not_averaged(archive, tmp_path):
    trainer = make_trainer(archive, tmp_path, small())
    trainer.train_step(first_batch(trainer))
    before, taken = (
        {k: v.clone() for k, v in trainer.averaged.state_dict().items()},
        trainer.progress.averaged_steps,
    )
    batch = first_batch(trainer)
    batch.features[0, 0, 0] = math.inf
    trainer.train_step(batch)
    assert trainer.progress.averaged_steps == taken == 1
    assert all(torch.equal(value, before[name]) for name, value in trainer.averaged.state_dict().items())


@pytest.mark.parametrize(("minutes", "saves"), [(29.9, []), (30.0, []), (30.1, [2])])
def test_a_save_within_an_epoch_comes_after_checkpoint_minutes(archive, tmp_path, monkeypatch, minutes, saves):
    trainer = make_trainer(
        archive, tmp_path, small(training=replace(small().training, epochs=1, checkpoint_minutes=60.0))
    )
    assert trainer.steps == 3
    now, step, saved = [0.0], trainer.train_step, []

    def slow(batch):
        now[0] += 60 * minutes
        return step(batch)

    clocks = {name: getattr(time, name) for name in ("perf_counter", "process_time", "time", "sleep")}
    monkeypatch.setattr(trainer_module, "time", SimpleNamespace(monotonic=lambda: now[0], **clocks))
    monkeypatch.setattr(trainer, "train_step", slow)
    monkeypatch.setattr(
        trainer, "_validate_and_save", lambda bar: setattr(trainer, "saved_step", trainer.progress.step)
    )
    monkeypatch.setattr(trainer, "save", lambda: saved.append(trainer.progress.step))
    trainer.run()
    assert saved == saves


SAME_ON_RESUME = {
    "training.threads", "data.workers", "data.cache", "training.checkpoint_minutes", "training.wandb",
    "training.monitor_epoch", "decoding.frames_per_batch",
}  # fmt: skip


def other(value):
    """A different value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, list):
        return [*value, 7]
    return f"{value}x" if isinstance(value, str) else value + 1


def settings_of(tree, name=""):
    for key, value in tree.items():
        yield from settings_of(value, f"{name}{key}.") if isinstance(value, dict) else [(name + key, value)]


def test_every_setting_that_changes_the_result_must_be_the_same_on_resume(tmp_path):
    then, refused = to_tree(Config()), set()
    for name, value in settings_of(then):
        now = to_tree(Config())
        *sections, last = name.split(".")
        place = now
        for section in sections:
            place = place[section]
        place[last] = other(value)
        try:
            check_same_settings(then, now, tmp_path)
        except InputError as error:
            assert f"with {name} = {value}, not {other(value)};" in str(error)
            refused.add(name)
    assert {name for name, _ in settings_of(then)} - refused == SAME_ON_RESUME


# ------------------------------------------------------------------------------------------------------ validation


def test_the_dev_loss_is_the_sum_over_the_set_by_its_tokens(archive, tmp_path):
    config = small(data=replace(small().data, utterances_per_batch=3))  # batches of 3 and 2
    trainer = make_trainer(archive, tmp_path, config)
    actual = validate(trainer.model, trainer.dev_data, trainer.vocabulary, config, CPU, tmp_path, 1.0)
    losses, counts = losses_by_hand(trainer, lambda i: i)
    assert actual.loss == pytest.approx(sum(losses) / sum(counts), rel=1e-5)


def losses_by_hand(trainer, audio_of) -> tuple[list[float], list[int]]:
    """The loss and the token count of each dev utterance i, with the audio of utterance audio_of(i)."""
    losses, counts, vocabulary = [], [], trainer.vocabulary
    with torch.inference_mode():
        for i, text in enumerate(trainer.dev_data.texts):
            features, target = trainer.dev_data[audio_of(i)][None], torch.tensor([[*vocabulary.encode(text), EOS]])
            memory = trainer.model.eval().listen(features, torch.tensor([features.shape[1]]))
            losses.append(float(token_loss(trainer.model.speller(memory, target)[0], target)))
            counts.append(target.shape[1])
    return losses, counts


def test_the_audio_gain_is_measured_in_batches_of_more_than_one(archive, tmp_path):
    config = small(data=replace(small().data, utterances_per_batch=4))
    trainer = make_trainer(archive, tmp_path, config)
    actual = validate(trainer.model, trainer.dev_data, trainer.vocabulary, config, CPU, tmp_path, 1.0)
    first, alone = sorted_batches(trainer.dev_data.frame_counts, frames_per_batch=30000, utterances_per_batch=4)
    assert (len(first), len(alone)) == (4, 1)
    following = {i: first[(n + 1) % 4] for n, i in enumerate(first)} | {alone[0]: alone[0]}
    paired, counts = losses_by_hand(trainer, lambda i: i)
    swapped, _ = losses_by_hand(trainer, following.get)
    increase, tokens = sum(swapped[i] - paired[i] for i in first), sum(counts[i] for i in first)
    assert actual.alignment.audio_gain == pytest.approx(increase / tokens, abs=1e-5)
    single = replace(config, data=replace(config.data, utterances_per_batch=1))
    assert (
        validate(trainer.model, trainer.dev_data, trainer.vocabulary, single, CPU, tmp_path, 1.0).alignment.audio_gain
        is None
    )


def test_pictures_show_utterances_of_median_length_without_padding(archive, tmp_path):
    config = small(training=replace(small().training, pictures=2))
    trainer = make_trainer(archive, tmp_path, config)
    validate(trainer.model, trainer.dev_data, trainer.vocabulary, config, CPU, tmp_path, 2.5)
    with np.load(tmp_path / "attention" / "epoch-0002.50.npz") as data:
        ids, arrays = data["ids"].tolist(), {name: data[name] for name in data.files}
    by_length = np.argsort(trainer.dev_data.frame_counts, kind="stable")
    assert sorted(ids) == sorted(trainer.dev_data.ids[i] for i in by_length[2:4])
    for n, name in enumerate(ids):
        i = trainer.dev_data.ids.index(name)
        frames = -(-int(trainer.dev_data.frame_counts[i]) // trainer.model.time_reduction)
        assert arrays[f"weights_{n}"].shape == (len(trainer.dev_data.texts[i]) + 1, frames)
        assert arrays[f"text_{n}"] == trainer.dev_data.texts[i]
        assert (tmp_path / "attention" / f"epoch-0002.50-{name}.png").is_file()


def test_validation_searches_with_attention_only(archive, tmp_path, monkeypatch):
    import las_fast.training.validate as module

    seen, search = [], module.greedy_search
    monkeypatch.setattr(module, "greedy_search", lambda m, memory, c: seen.append(c) or search(m, memory, c))
    decoding = DecodingConfig(ngram_weight=0.3, length_reward=0.2, maximum_extra=4)
    config = small(decoding=decoding)
    trainer = make_trainer(archive, tmp_path, config)
    validate(trainer.model, trainer.dev_data, trainer.vocabulary, config, CPU, tmp_path, 1.0)
    assert set(seen) == {replace(decoding, ngram_weight=0.0, length_reward=0.0)} and not trainer.model.training


# ------------------------------------------------------------------------------------------- inputs of the model


@pytest.fixture
def seen_features(monkeypatch):
    """A list of the features that reach the model, by utterance."""
    seen, listen = [], LAS.listen

    def spy(self, features, lengths, *args, **options):
        seen.extend(row[:n].clone() for row, n in zip(features, lengths.tolist(), strict=True))
        return listen(self, features, lengths, *args, **options)

    monkeypatch.setattr(LAS, "listen", spy)
    return seen


def transcribed(checkpoint_path, recording, *argv):
    transcribe.main([str(recording), "--checkpoint", str(checkpoint_path), "--device", "cpu", "--beam", "2", *argv])


def decoded(checkpoint_path, data, out, *argv, split="dev"):
    args = ["--checkpoint", str(checkpoint_path), "--data", str(data), "--split", split, "--out", str(out)]
    decode.main([*args, "--device", "cpu", *argv])


@pytest.fixture
def recording(tmp_path):
    return write_audio(tmp_path / "said.wav", make_speech(0.9))


@pytest.mark.parametrize("deltas", [0, 1, 2])
def test_transcribe_computes_the_deltas_of_training(tmp_path, recording, seen_features, deltas):
    transcribed(make_checkpoint(tmp_path, 20, mel_bins=23, deltas=deltas), recording)
    (frames,) = seen_features
    assert frames.shape[1] == 20 * (1 + deltas)
    torch.testing.assert_close(frames, add_deltas(frames[:, :20], deltas))


@pytest.mark.parametrize(
    "features",
    [
        {"kind": "mfcc", "size": 20, "mel_bins": 23, "deltas": 2},
        {"kind": "logmel", "size": 80, "sample_rate": 8000, "window_ms": 30.0, "shift_ms": 12.5},
        {"kind": "logmel", "size": 80, "normalisation": "none"},
    ],
    ids=lambda features: "-".join(map(str, features.values())),
)
def test_transcribe_and_decode_compute_the_same_frames(tmp_path, recording, seen_features, monkeypatch, features):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "list.tsv").write_text("id\tpath\tsplit\ttranscript\nsaid\tsaid.wav\tdev\tA\n")
    path = make_sound_checkpoint(tmp_path, **features)
    transcribed(path, recording)
    decoded(path, tmp_path / "list.tsv", tmp_path / "out.csv")
    ours, theirs = seen_features
    assert len(ours) == pytest.approx(900 / FeatureConfig(**features).shift_ms, abs=4)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def make_sound_checkpoint(folder, **features):
    """Write a checkpoint with the given features, computed from audio."""
    return make_checkpoint(folder, 28, sections={"features": FeatureConfig(**features)})


def with_statistics(path, mean: float, std: float):
    """Replace the statistics of a checkpoint."""
    loaded = checkpoint.load_model(path)
    size = loaded.config.features.size
    statistics = Statistics(torch.full((size,), mean), torch.full((size,), std))
    checkpoint.save_model(path, loaded.model.state_dict(), loaded.config, statistics, loaded.info)
    return path


@pytest.mark.parametrize("command", ["transcribe", "decode", "tune"])
def test_each_command_normalises_by_the_statistics_of_the_checkpoint(
    tmp_path, recording, seen_features, command, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    make_manifest(tmp_path / "data", utterances=1)
    for mean, std in ((0.0, 1.0), (30.0, 2.0)):
        path = make_checkpoint(tmp_path, 20, mel_bins=23, normalisation="global")
        with_statistics(path, mean, std)
        if command == "transcribe":
            transcribed(path, recording)
        elif command == "decode":
            decoded(path, tmp_path / "data", tmp_path / "out.csv")
        else:
            argv = ["--checkpoint", str(path), "--data", str(tmp_path / "data"), "--device", "cpu", "--beam", "1"]
            tune.main(argv)
    plain, scaled = seen_features
    torch.testing.assert_close(scaled, (plain - 30) / 2)


def test_decoding_uses_the_checkpoints_normalise_text(tmp_path):
    manifest = make_manifest(tmp_path / "data", utterances=2)
    manifest.write_text(manifest.read_text().replace("\tA", "\tá-a "), encoding="utf-8")
    for normalise, argv in ((True, ()), (False, ("--normalise-text",))):
        path = make_checkpoint(tmp_path, 20, mel_bins=23, sections={"data": DataConfig(normalise_text=normalise)})
        decoded(path, tmp_path / "data", tmp_path / "out.csv", "--jsonl", str(tmp_path / "rows.jsonl"), *argv)
        rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
        assert all(row["reference"].startswith("A A ") for row in rows)
    path = make_checkpoint(tmp_path, 20, mel_bins=23)
    with pytest.raises(InputError, match="map them with --normalise-text"):
        decoded(path, tmp_path / "data", tmp_path / "out.csv")


def test_each_field_of_decoding_reaches_the_search_from_the_checkpoint(tmp_path, archive, monkeypatch, recording):
    """decode, transcribe and tune search with the checkpoint's settings and the command line's changes to them."""
    import las_fast.search.beam as search

    settings = DecodingConfig(
        beam=3, length_penalty=0.7, eos_threshold=0.1, minimum_share=0.01, maximum_share=0.2, maximum_extra=4,
        coverage_weight=0.05, frames_per_batch=9999, precision="fp32",
    )  # fmt: skip
    seen, beam_search = [], search.beam_search

    def spy(model, memory, config, **options):
        seen.append(config)
        return beam_search(model, memory, config, **options)

    monkeypatch.setattr("las_fast.search.dataset.beam_search", spy)
    monkeypatch.setattr("las_fast.search.grid.beam_search", spy)
    path = make_checkpoint(tmp_path, 28, sections={"decoding": settings})
    decoded(path, archive, tmp_path / "out.csv", split="dev-clean")
    decoded(path, archive, tmp_path / "out.csv", "--decoding.beam", "2", split="dev-clean")
    sound = make_checkpoint(tmp_path, 20, mel_bins=23, sections={"decoding": settings})
    transcribe.main([str(recording), "--checkpoint", str(sound), "--device", "cpu"])
    transcribe.main([str(recording), "--checkpoint", str(sound), "--device", "cpu", "--beam", "2"])
    tune.main(["--checkpoint", str(path), "--data", str(archive), "--device", "cpu", "--length-penalty", "0.2", "0.4"])
    two = replace(settings, beam=2)
    assert set(seen[:1]) == {settings} and Counter(seen) == Counter(
        [settings, two, settings, two, replace(settings, length_penalty=0.2), replace(settings, length_penalty=0.4)]
    )


def test_an_exported_model_keeps_everything_but_the_precision_of_its_weights(tmp_path):
    sections = {"data": DataConfig(normalise_text=True), "decoding": DecodingConfig(beam=3, length_penalty=0.7)}
    info = {"epoch": 2.0, "data": {"kind": "features", "name": "HW4P2 F23"}}
    path = make_checkpoint(tmp_path, 28, info=info, sections=sections, normalisation="global")
    with_statistics(path, 3.0, 2.0)
    export.main(["--checkpoint", str(path), "--out", str(tmp_path / "small.safetensors"), "--decoding.beam", "5"])
    theirs, ours = checkpoint.load_model(path), checkpoint.load_model(tmp_path / "small.safetensors")
    assert ours.config == replace(theirs.config, decoding=replace(theirs.config.decoding, beam=5))
    assert ours.info == theirs.info == info and ours.vocabulary == theirs.vocabulary
    assert torch.equal(ours.statistics.mean, theirs.statistics.mean)
    assert torch.equal(ours.statistics.std, theirs.statistics.std)
    for name, value in theirs.model.state_dict().items():
        assert torch.equal(ours.model.state_dict()[name], value.half().float()), name


# ------------------------------------------------------------------------------------------------------------ data


@pytest.mark.parametrize(
    ("split", "names"),
    [
        ("dev+dev", ("dev-clean",)),
        ("dev,dev-clean", ("dev-clean",)),
        ("train+train-clean-100", ("train-clean-100", "train-clean-360")),
        ("100+460", ("train-clean-100", "train-clean-360")),
        (" dev , DEV-clean", ("dev-clean",)),
    ],
)
def test_a_split_named_twice_is_used_once(archive, tmp_path, split, names):
    corpus = open_corpus(archive)
    assert corpus.resolve(split) == names
    decoded(make_checkpoint(tmp_path), archive, tmp_path / "out.csv", split=split)
    with (tmp_path / "out.csv").open(newline="") as file:
        assert len(list(csv.reader(file))) == 1 + 5 * len(names)


def test_a_split_that_is_also_in_a_list_is_used_once(archive):
    options = {"features": FeatureConfig(size=28), "data": DataConfig(), "need_text": True, "progress": False}
    assert len(load_dataset(open_corpus(archive), ("dev-clean", "dev"), **options)) == 5


CHANGES_FEATURES = {
    "logmel": {"kind": "mfcc", "size": 40, "sample_rate": 8000, "window_ms": 20.0, "shift_ms": 12.5,
               "trim_silence": False},
    "mfcc": {"kind": "logmel", "size": 12, "sample_rate": 8000, "window_ms": 20.0, "shift_ms": 12.5, "mel_bins": 40,
             "lifter": 0.0, "trim_silence": False},
}  # fmt: skip
SAME_FEATURES = {
    "logmel": {"mel_bins": 40, "lifter": 0.0, "normalisation": "none", "deltas": 1},
    "mfcc": {"normalisation": "global", "deltas": 2},
}


@pytest.mark.parametrize("kind", CHANGES_FEATURES)
def test_a_cache_entry_depends_on_every_setting_that_affects_its_frames(tmp_path, kind):
    corpus = open_corpus(make_manifest(tmp_path / "data", utterances=1))
    base = FeatureConfig(kind=kind, size=20, mel_bins=23)

    def folder(features):
        utterances = corpus.utterances("dev")
        return open_cache(corpus, "dev", utterances, features, folder=str(tmp_path / "cache"), progress=False).folder

    changed = {name: folder(replace(base, **{name: value})) for name, value in CHANGES_FEATURES[kind].items()}
    assert len({folder(base), *changed.values()}) == 1 + len(CHANGES_FEATURES[kind]), changed
    assert {folder(replace(base, **{name: value})) for name, value in SAME_FEATURES[kind].items()} == {folder(base)}
    assert CHANGES_FEATURES[kind].keys() | SAME_FEATURES[kind].keys() == set(to_tree(FeatureConfig()))


def test_a_cache_entry_depends_on_files_their_order_and_their_texts(tmp_path):
    manifest = make_manifest(tmp_path / "data", utterances=2)
    lines = manifest.read_text().splitlines(keepends=True)
    text = lines[-1].split("\t")[-1]

    def folder():
        corpus = open_corpus(manifest)
        utterances = corpus.utterances("dev")
        return open_cache(
            corpus, "dev", utterances, FeatureConfig(), folder=str(tmp_path / "cache"), progress=False
        ).folder

    changes = {
        "none": lines,
        "order": [*lines[:-2], lines[-1], lines[-2]],
        "text": [*lines[:-1], lines[-1].replace(text, "OTHER\n")],
        "seconds": [*lines[:-1], lines[-1].replace("\t0.4\t", "\t0.3\t")],
        "id": [*lines[:-1], lines[-1].replace("dev-1\t", "dev-x\t", 1)],
        "fewer": lines[:-1],
    }
    folders = {}
    for name, changed in changes.items():
        manifest.write_text("".join(changed))
        folders[name] = folder()
    assert len(set(folders.values())) == len(changes), folders
    manifest.write_text("".join(lines))
    assert folder() == folders["none"]


# -------------------------------------------------------------------------------------------------- language model


def test_the_saved_language_model_is_of_all_text(tmp_path):
    sentences = [f"{'AB'[i % 2]}{'BA'[i // 2 % 2]} {'ABA'[: 1 + i % 3]}{'B' * (i % 5)}" for i in range(200)]
    (tmp_path / "text.txt").write_text("\n".join(sentences) + "\n")
    out = tmp_path / "x.safetensors"
    lm.main([str(tmp_path / "text.txt"), "--out", str(out), "--order", "3", "--characters", "AB "])
    model = ngram.load_lm(out)
    whole = lm.train(sentences, order=3, characters="AB ")
    assert model.sentences == 200
    for saved, expected in zip(model.levels, whole.levels, strict=True):
        assert np.array_equal(saved.ngrams, expected.ngrams)
        assert np.allclose(saved.log_probs, expected.log_probs, atol=0.02)
    kept, held = lm.encode_held_out([(text, 1) for text in sentences], "AB ")
    assert kept and held, "some are held out, some are not"


# ------------------------------------------------------------------------------------------------------------- logs


def test_a_resumed_log_keeps_the_lines_up_to_its_step_and_none_after(tmp_path):
    lines = [json.dumps({"kind": "train", "step": step}) for step in (3, 4, 5, 6)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + '\n{"kind": "tra')
    RunLog(tmp_path, small(), 4).close()
    assert (tmp_path / "log.jsonl").read_text().splitlines() == lines[:2]


def test_the_log_of_a_new_training_is_empty(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"kind": "train", "step": 1}\n')
    RunLog(tmp_path, small(), 0).close()
    assert (tmp_path / "log.jsonl").read_text() == ""


class Board:
    """Replaces TensorBoard and records scalars."""

    trainer: list = []

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.scalars = folder, purge_step, []
        Board.made = [self]

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def add_text(self, tag, text, step):
        assert tag == "settings"

    def close(self):
        self.scalars.append("closed")


def test_the_log_and_tensorboard_have_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", Board)
    log = RunLog(tmp_path, small(), 4)
    log.training(5, 0.5, {"loss": 2.0, "attention": math.nan, "speed": 9.0}, 0.01)
    alignment = Alignment(0.9, 0.8, 0.78, 0.6, 3)
    log.validation(6, 1.0, Validation(1.5, Scores(3, 4.0, 50.0, 60.0), alignment, []), "a line", 0.123456)
    log.close()
    (board,) = Board.made
    assert (board.folder, board.purge_step) == (str(tmp_path / "tensorboard"), 5)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    peak = rows[1]["peak_gib"]
    assert rows == [
        {"kind": "train", "step": 5, "epoch": 0.5, "lr": 0.01, "loss": 2.0, "attention": None, "speed": 9.0},
        {"kind": "valid", "step": 6, "epoch": 1.0, "loss": 1.5, "utterances": 3, "ld": 4.0, "cer": 50.0, "wer": 60.0,
         "monitor": {"diagonal": 0.9, "sharp": 0.8, "monotonic": 0.78, "coverage": 0.6, "formed": True,
                     "utterances": 3, "audio_gain": None}, "line": "a line", "core_hours": 0.1235, "peak_gib": peak},
    ]  # fmt: skip
    scalars = {(name, step): value for name, value, step in board.scalars[:-1]}
    assert board.scalars[-1] == "closed" and len(scalars) == len(board.scalars) - 1
    for row in rows:
        numbers = {k: v for k, v in row.items() if isinstance(v, float) and k != "epoch"}
        for name, value in numbers.items():
            assert scalars.pop((f"{row['kind']}/{name}", row["step"])) == value
    assert math.isnan(scalars.pop(("train/attention", 5)))
    expected = {"diagonal": 0.9, "sharp": 0.8, "monotonic": 0.78, "coverage": 0.6, "formed": 1.0, "utterances": 3.0}
    assert scalars == {(f"monitor/{name}", 6): value for name, value in expected.items()}


def test_each_log_line_is_flushed_at_once(tmp_path):
    log = RunLog(tmp_path, small(), 0)
    log.training(1, 0.1, {"loss": 2.0}, 0.01)
    assert json.loads((tmp_path / "log.jsonl").read_text())["step"] == 1
    log.close()
