"""A batch that does not fit in memory runs in parts: same gradient, same losses, less memory."""

from dataclasses import replace

import pytest
import torch
from tiny_checkpoints import MODEL, make_trainer, small
from tiny_corpora import make_archive

from las_fast.config import TeacherForcingStage, TrainingConfig
from las_fast.errors import InputError
from las_fast.search import cuda_graph
from las_fast.training.parts import Parts


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return make_archive(tmp_path_factory.mktemp("data"), "F23", utterances=6)


@pytest.fixture
def trainer(archive, tmp_path):
    """A trainer with dropout, sampled tokens and all losses, on batches of five utterances."""
    training = TrainingConfig(
        epochs=3, precision="fp32", pictures=0, ctc_weight=0.5, guided_weight=1.0, guided_frames=3.0,
        teacher_forcing=(TeacherForcingStage(0.0, 9.0, 0.5, 0.5),),
    )  # fmt: skip
    data = replace(small().data, utterances_per_batch=5)
    return make_trainer(archive, tmp_path, small(training=training, data=data, model=replace(MODEL, ctc_layer=0)))


def first_batch(trainer):
    return max(trainer._rest_of_epoch(), key=lambda batch: len(batch.indices))


def fail_above(trainer, monkeypatch, largest, error=MemoryError):
    """Let the losses of more than `largest` utterances end in `error`, after some gradients; return the sizes tried."""
    tried, losses = [], trainer._loss

    def failing(batch):
        tried.append(len(batch.indices))
        loss, parts = losses(batch)
        if tried[-1] > largest:
            loss.backward(retain_graph=True)  # memory runs out in the middle of a backward pass
            raise error("no memory")
        return loss, parts

    monkeypatch.setattr(trainer, "_loss", failing)
    return tried


def gradients(trainer):
    return {name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()}


@pytest.mark.parametrize(("largest", "sizes"), [(4, [5, 3, 2]), (2, [5, 3, 2, 2, 1]), (1, [5, 3, 2, 1, 1, 1, 1, 1])])
def test_the_parts_give_the_gradient_and_losses_of_the_whole(trainer, monkeypatch, capsys, largest, sizes):
    batch = first_batch(trainer)
    whole, expected = trainer._gradients(batch), gradients(trainer)
    tried = fail_above(trainer, monkeypatch, largest)
    parts, actual = trainer._gradients(batch), gradients(trainer)
    assert tried == sizes
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name} {text}"
        )
    assert parts.keys() == whole.keys() == {"loss", "attention", "ctc", "guided"}
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-5, atol=1e-6)
    assert capsys.readouterr().err.count("warning: a batch of 5 utterances, ") == 1


def test_a_step_in_parts_has_the_gradient_norm_of_the_whole_and_counts_once(archive, trainer, tmp_path, monkeypatch):
    other = make_trainer(archive, tmp_path / "other", trainer.config)
    batch = first_batch(trainer)
    fail_above(other, monkeypatch, 3)
    ours, theirs = trainer.train_step(batch), other.train_step(batch)
    torch.testing.assert_close(theirs["gradient_norm"], ours["gradient_norm"], rtol=1e-4, atol=1e-6)
    assert other.progress == trainer.progress and other.progress.step == 1


def test_later_batches_of_that_size_are_divided_at_once_and_smaller_ones_are_not(trainer, monkeypatch):
    batch = first_batch(trainer)
    tried = fail_above(trainer, monkeypatch, 3)
    for size, sizes in ((5, [5, 3, 2]), (5, [3, 2]), (3, [3]), (1, [1])):
        tried.clear()
        trainer._gradients(batch.rows(0, size))
        assert tried == sizes


def test_an_utterance_that_does_not_fit_alone_ends_the_training(trainer, monkeypatch):
    batch = first_batch(trainer)
    trainer.batch_shape = (len(batch.indices), batch.features.shape[1])
    fail_above(trainer, monkeypatch, 0)
    with pytest.raises(MemoryError) as error:
        trainer._gradients(batch)
    sentence = str(trainer._explain(error.value, False))
    frames = batch.features.shape[1]
    assert sentence.startswith(f"training on an utterance of {frames} frames does not fit in memory; start again with ")


@pytest.mark.parametrize(("failures", "sizes"), [(1, [5, 5]), (2, [5, 5, 3, 2])])
def test_the_whole_batch_is_tried_again_without_the_graphs_of_the_validation(
    trainer, monkeypatch, capsys, failures, sizes
):
    batch, losses, tried = first_batch(trainer), trainer._loss, []

    def failing(batch):
        tried.append(len(batch.indices))
        if len(tried) <= failures:
            raise MemoryError("no memory")
        return losses(batch)

    monkeypatch.setattr(trainer, "_loss", failing)
    monkeypatch.setitem(cuda_graph._graphs, trainer.model, {"sizes": "a graph"})
    trainer._gradients(batch)
    assert tried == sizes and not cuda_graph.has_graphs()
    assert ("run in parts" in capsys.readouterr().err) == (failures == 2)


def test_a_single_utterance_is_tried_again_without_them_too(trainer, monkeypatch):
    batch, tried = first_batch(trainer).rows(0, 1), fail_above(trainer, monkeypatch, 0)
    monkeypatch.setitem(cuda_graph._graphs, trainer.model, {"sizes": "a graph"})
    with pytest.raises(MemoryError):
        trainer._gradients(batch)
    assert tried == [1, 1]


def test_other_errors_are_not_retried(trainer, monkeypatch):
    tried = fail_above(trainer, monkeypatch, 0, error=RuntimeError)
    with pytest.raises(RuntimeError, match="no memory"):
        trainer._gradients(first_batch(trainer))
    assert len(tried) == 1
    assert not isinstance(trainer._explain(RuntimeError("shapes"), False), InputError)


def test_parts_are_halved_until_they_fit_and_never_below_one_utterance():
    parts = Parts(20_000)
    assert (parts.begin(96, 600), parts.size(96)) == (1, 96)
    assert (parts.halve(96, 600), parts.size(96), parts.limit) == (2, 48, 28_800)
    assert (parts.halve(96, 600), parts.size(96), parts.limit) == (4, 24, 14_400)
    assert parts.begin(96, 150) == 1 and parts.begin(97, 150) == 2 and parts.begin(3, 10_000) == 4
    assert parts.size(3) == 1


@pytest.mark.parametrize(("frames", "advised"), [(150, 14_400), (600, 20_000)])
def test_the_advised_batch_is_smaller_than_the_one_that_failed_and_than_the_setting(capsys, frames, advised):
    Parts(20_000).halve(96, frames)
    assert capsys.readouterr().err.endswith(f" start again with --data.frames-per-batch below {advised}\n")
