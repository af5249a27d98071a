"""The frames of words: those at which the CTC head emits their characters."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_checkpoints import make_trainer, small
from tiny_corpora import make_archive

from las_fast.config import DataConfig, FeatureConfig
from las_fast.data.splice import Splice, WordTable
from las_fast.errors import InputError
from las_fast.search.confidence import DEFAULT, read_calibration
from las_fast.search.words import TokenEvidence
from las_fast.text import Vocabulary
from las_fast.training import trainer as trainer_module
from las_fast.training.align import MARGIN, align_words, locate_words

CALIBRATION = read_calibration(DEFAULT)
VOCABULARY = Vocabulary()
REDUCTION = 2  # feature frames per CTC frame


def evidence(*times):
    return TokenEvidence(np.array(times), np.log(np.linspace(0.9, 0.5, len(times))))


def test_words_that_touch_are_cut_between_them():
    spans, seconds, log_probs = locate_words("AB CD", evidence(0.2, 0.25, 0.3, 0.35, 0.4), 1.0, CALIBRATION)
    assert spans.tolist() == [[0, 2], [3, 5]]
    assert seconds[0, 1] == seconds[1, 0] and 0.25 < seconds[0, 1] < 0.35
    assert log_probs == pytest.approx([np.log([0.9, 0.8]).mean(), np.log([0.6, 0.5]).mean()])


def test_of_a_pause_a_word_gets_the_margin():
    _, seconds, _ = locate_words("AB CD", evidence(1.0, 1.2, 2.5, 3.0, 3.2), 5.0, CALIBRATION)
    first = [1.0 + CALIBRATION.start_after_pause - MARGIN, 1.2 + CALIBRATION.end + MARGIN]
    second = [3.0 + CALIBRATION.start_after_pause - MARGIN, 3.2 + CALIBRATION.end + MARGIN]
    np.testing.assert_allclose(seconds, [first, second])


def test_words_stay_within_the_utterance():
    _, seconds, _ = locate_words("A B", evidence(0.0, 0.01, 0.02), 0.05, CALIBRATION)
    assert seconds.min() >= 0 and seconds.max() <= 0.05 + 1e-9 and (np.diff(seconds)[:, 0] >= 0).all()


class Model(torch.nn.Module):
    """Its CTC head emits the k-th character of utterance i in CTC frame at[i][k], and blanks elsewhere."""

    ctc_time_reduction = REDUCTION

    def __init__(self, texts, at, counts):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.texts, self.at, self.counts = texts, at, counts

    def listen(self, features, lengths):
        assert not self.training and not torch.is_grad_enabled()
        frames = -(-features.shape[1] // REDUCTION)
        logits = torch.zeros(len(features), frames, len(VOCABULARY))
        logits[:, :, 0] = 9.0
        for row, length in enumerate(lengths.tolist()):
            i = self.counts.index(length)
            for token, frame in zip(VOCABULARY.encode(self.texts[i]), self.at[i], strict=False):
                if frame < frames:
                    logits[row, frame, token] = 18.0
        return SimpleNamespace(ctc_logits=logits, ctc_lengths=-(-lengths // REDUCTION))


class Data:
    features = FeatureConfig()

    def __init__(self, texts, counts):
        self.texts, self.frame_counts = texts, np.array(counts)

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, i):
        return torch.zeros(int(self.frame_counts[i]), 80)


def test_words_get_the_frames_of_their_characters():
    texts, counts = ["HI YOU", "A", "TOO LONG FOR THIS", "SO IT IS", "BEE"], [200, 100, 12, 300, 6]
    at = [[20, 25, 30, 60, 65, 70], [10], range(17), [30, 40, 45, 50, 55, 100, 110, 120], range(3)]
    checks = []
    table = align_words(
        Model(texts, at, counts).train(),
        Data(texts, counts),
        VOCABULARY,
        data=DataConfig(frames_per_batch=310),
        precision=torch.float32,
        check_stop=lambda: checks.append(1),
    )
    assert len(checks) > 1
    assert table.utterances.tolist() == [0, 0, 1, 3, 3, 3]  # the others need more CTC frames than there are
    words = [texts[i][a:b] for i, (a, b) in zip(table.utterances, table.spans, strict=True)]
    assert words == ["HI", "YOU", "A", "SO", "IT", "IS"]
    centres = [(20 + 25) / 2, (60 + 70) / 2, 10, (30 + 40) / 2, (50 + 55) / 2, (110 + 120) / 2]
    np.testing.assert_allclose(table.frames.mean(1) / REDUCTION, centres, atol=3)
    assert (table.frames[:, 0] < table.frames[:, 1]).all() and (table.log_probs > -0.1).all()


def test_a_training_set_without_alignable_words_gives_an_empty_table():
    table = align_words(
        Model(["ABC"], [[0]], [2]), Data(["ABC"], [2]), VOCABULARY, data=DataConfig(), precision=torch.float32
    )
    assert table.utterances.shape == (0,) and table.spans.shape == table.frames.shape == (0, 2)


# ------------------------------------------------------------------------------------------------------ in a training


@pytest.fixture
def trainer(tmp_path):
    archive = make_archive(tmp_path, "F23", utterances=4)
    config = small()
    config = replace(
        config,
        model=replace(config.model, ctc_layer=0),
        augment=replace(config.augment, splice=1.0, splice_epoch=1),
        training=replace(config.training, epochs=3),
    )
    return make_trainer(archive, tmp_path / "run", config)


@pytest.fixture
def aligned(monkeypatch):
    """Replaces align_words; lists the models that it got."""
    models = []

    def align(model, dataset, *_, **__):
        models.append(model)
        words = [(i, 0, len(text), 0, 10) for i, text in enumerate(dataset.texts)]
        columns = np.array(words, np.int32)
        return WordTable(columns[:, 0], columns[:, 1:3], columns[:, 3:], np.zeros(len(words), np.float32))

    monkeypatch.setattr(trainer_module, "align_words", align)
    return models


def test_words_are_aligned_once_at_the_start_of_the_epoch(trainer, aligned, capsys):
    assert trainer._splice_of(0) is None and not aligned and not (trainer.out / "words.npz").exists()
    trainer.progress.step = trainer.curriculum.steps_before(1)
    splice = trainer._splice_of(1)
    assert isinstance(splice, Splice) and trainer._splice_of(2) is splice
    assert aligned == [trainer.averaged or trainer.model] and (trainer.out / "words.npz").is_file()
    assert "augment.splice: 4 words aligned; the CTC head is sure of 4\n" in capsys.readouterr().out


def test_a_training_resumed_within_the_epochs_takes_the_table_of_the_run(trainer, aligned, capsys):
    first = trainer.curriculum.steps_before(1)
    trainer.progress.step = first
    table = trainer._splice_of(1).table
    trainer.splice, trainer.progress.step = None, first + 1
    np.testing.assert_array_equal(trainer._splice_of(1).table.frames, table.frames)
    assert len(aligned) == 1
    trainer.splice, trainer.progress.step = None, first  # a table from before the start of the epoch is not used
    trainer._splice_of(1)
    assert len(aligned) == 2 and "warning" not in capsys.readouterr().out


def test_without_the_table_of_the_run_words_are_aligned_again_with_a_warning(trainer, aligned, capsys):
    trainer.progress.step = trainer.curriculum.steps_before(1) + 1
    trainer._splice_of(1)
    assert len(aligned) == 1 and "words.npz is missing; a training that was not" in capsys.readouterr().out


def unsure(count):
    return WordTable(
        *(np.zeros(shape, np.int32) for shape in (count, (count, 2), (count, 2))), np.full(count, -5.0, np.float32)
    )


@pytest.mark.parametrize("count", [0, 3])
def test_an_unsure_head_is_warned_of_later_and_refused_at_the_start(trainer, monkeypatch, capsys, count):
    monkeypatch.setattr(trainer_module, "align_words", lambda *_, **__: unsure(count))
    trainer.progress.step = trainer.curriculum.steps_before(1)
    trainer._splice_of(1)
    assert "warning: the CTC head is unsure of most words, which therefore stay" in capsys.readouterr().out
    trainer.splice, trainer.progress.step = None, 0
    with pytest.raises(InputError, match=f"not sure of any of the {count} words; raise --augment.splice-epoch"):
        trainer._splice_of(1)


def test_the_time_of_the_alignment_is_not_part_of_the_pace(trainer, aligned, monkeypatch):
    seconds = iter([10.0, 17.0])
    monkeypatch.setattr(trainer_module.time, "perf_counter", lambda: next(seconds))
    trainer.progress.step = trainer.curriculum.steps_before(1)
    before = trainer.pace.started
    trainer._splice_of(1)
    assert trainer.pace.started == before + 7.0


def test_the_batches_have_the_words_of_the_splice(trainer, aligned):
    trainer.progress.step = trainer.curriculum.steps_before(1)
    whole = {text for batch in trainer._rest_of_epoch() for text in spelled(batch, trainer.vocabulary)}
    trainer.splice = lambda i, raw, generator: (raw + 1, "ZZZ")
    changed = list(trainer._rest_of_epoch())
    assert {text for batch in changed for text in spelled(batch, trainer.vocabulary)} == {"ZZZ"} and "ZZZ" not in whole


def spelled(batch, vocabulary):
    return [
        vocabulary.decode(tokens[: n - 1].tolist()) for tokens, n in zip(batch.tokens, batch.token_lengths, strict=True)
    ]


def test_a_model_that_is_sure_of_no_word_is_refused_before_anything_is_saved(trainer, monkeypatch):
    trainer.config = replace(
        trainer.config,
        augment=replace(trainer.config.augment, splice_epoch=0),
        training=replace(trainer.config.training, validate_first=True),
    )
    trainer.progress.validated = -1
    monkeypatch.setattr(trainer_module, "align_words", lambda *_, **__: unsure(3))
    with pytest.raises(InputError, match="not sure of any of the 3 words; raise .*, or give --augment.splice 0$"):
        trainer.run()
    assert not (trainer.out / "last.pt").exists()
