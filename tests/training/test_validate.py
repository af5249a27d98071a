"""Validation: transcripts, stops, and the choice, content and names of the attention pictures."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_checkpoints import MODEL, make_trainer, small
from tiny_corpora import make_archive

from las_fast.config import DecodingConfig, TrainingConfig
from las_fast.errors import Stopped
from las_fast.search.beam import greedy_search
from las_fast.training import validate
from las_fast.training.validate import MAX_ID_BYTES, AttentionPictures

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """An untrained trainer with a CTC head and five dev utterances in batches of two."""
    config = small(
        model=replace(MODEL, ctc_layer=0),
        training=TrainingConfig(epochs=2, precision="fp32", pictures=1),
        decoding=DecodingConfig(ctc_weight=0.3, ngram_weight=0.2, length_reward=0.1, maximum_extra=2),
    )
    archive = make_archive(tmp_path_factory.mktemp("data"), "F23", utterances=5)
    trainer = make_trainer(archive, tmp_path_factory.mktemp("out"), config)
    with torch.no_grad():  # larger weights, so that the transcripts differ
        for parameter in trainer.model.parameters():
            parameter *= 3.0
    return trainer


def run_validation(trainer, out, **options):
    return validate.validate(
        trainer.model, trainer.dev_data, trainer.vocabulary, trainer.config, CPU, out, 1.0, **options
    )


def test_each_utterance_is_transcribed_by_attention_only(trainer, tmp_path, monkeypatch):
    monkeypatch.setattr("os.fork", lambda: pytest.fail("a dev set is loaded in this process"))
    trainer.model.train()
    actual = run_validation(trainer, tmp_path)
    alone = replace(trainer.config.decoding, ctc_weight=0.0, ngram_weight=0.0, length_reward=0.0)
    expected = []
    with torch.inference_mode():
        for features in (trainer.dev_data[i] for i in range(5)):
            memory = trainer.model.listen(features[None], torch.tensor([len(features)]))
            expected.append(trainer.vocabulary.decode(greedy_search(trainer.model, memory, alone)[0][0].text_tokens))
    assert actual.hypotheses == expected and len(set(expected)) > 1 and not trainer.model.training
    assert actual.scores.utterances == actual.alignment.utterances == 5


def test_a_validation_never_searches_in_int8(trainer, tmp_path, monkeypatch):
    """It is not available on every device, and a training could not go on without it."""
    seen = []
    monkeypatch.setattr(validate, "greedy_search", lambda *args: seen.append(args[2].precision) or greedy_search(*args))
    for precision in ("int8", "bf16"):
        decoding = replace(trainer.config.decoding, precision=precision)
        monkeypatch.setattr(trainer, "config", replace(trainer.config, decoding=decoding))
        run_validation(trainer, tmp_path)
    assert seen == ["auto"] * 3 + ["bf16"] * 3


def test_a_validation_returns_the_texts_and_pictures_of_its_samples(trainer, tmp_path):
    actual = run_validation(trainer, tmp_path)
    (sample,) = actual.samples
    i = trainer.dev_data.ids.index(sample.id)
    assert (sample.reference, sample.hypothesis) == (trainer.dev_data.texts[i], actual.hypotheses[i])
    assert sample.picture.parent == tmp_path / "attention" and sample.picture.read_bytes().startswith(b"\x89PNG")


def test_a_validation_can_be_stopped_before_each_batch(trainer, tmp_path):
    calls = []
    run_validation(trainer, tmp_path, check_stop=lambda: calls.append(1))
    assert len(calls) == 3  # batches of two, two and one utterances

    def stop():
        raise Stopped

    with pytest.raises(Stopped):
        run_validation(trainer, tmp_path, check_stop=stop)


def make_pictures(ids, frames, pictures):
    return AttentionPictures(
        SimpleNamespace(ids=ids, texts=["A B"] * len(ids), frame_counts=np.array(frames)), pictures, 0.04
    )


@pytest.mark.parametrize(
    ("frames", "pictures", "wanted"),
    [
        ([50, 10, 30, 20, 40], 2, [2, 4]),
        ([50, 10, 30, 20, 40], 9, [2, 4, 0]),
        ([50, 10, 30, 20, 40], 0, []),
        ([20, 10], 1, [0]),
        ([7] * 99, 3, [49, 50, 51]),  # equal lengths keep their order
    ],
)
def test_pictures_start_at_the_median_length(frames, pictures, wanted):
    assert make_pictures([str(i) for i in range(len(frames))], frames, pictures).wanted == wanted


def test_pictures_are_kept_without_padding_and_as_float32(tmp_path):
    actual = make_pictures(["a", "b", "c"], [3, 4, 5], 2)
    weights = torch.arange(24).reshape(2, 3, 4).to(torch.bfloat16)
    actual.collect(torch.tensor([1, 0]), weights, torch.tensor([2, 3]), torch.tensor([3, 4]))
    assert list(actual.weights) == [1] and actual.weights[1].dtype == np.float32
    assert actual.weights[1].tolist() == [[0.0, 1.0, 2.0], [4.0, 5.0, 6.0]]


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("a-B_7.x", "a-B_7.x"),
        ("speaker one/../é", "speaker_one_.._é"),
        ("x" * (MAX_ID_BYTES + 1), "x" * 120),
        ("x" + "é" * 60, "x" + "é" * 59),  # 121 bytes; no character is cut
    ],
)
def test_a_picture_is_named_after_its_utterance_as_far_as_file_names_allow(tmp_path, monkeypatch, name, safe):
    titles = []
    picture = validate.attention_picture

    def spy(path, **args):
        titles.append((args["text"], args["title"], args["frame_seconds"]))
        picture(path, **args)

    monkeypatch.setattr(validate, "attention_picture", spy)
    actual = make_pictures([name], [5], 1)
    actual.collect(torch.tensor([0]), torch.eye(4)[None], torch.tensor([4]), torch.tensor([4]))
    for epoch, text in ((1.5, "A"), (12.0, "A B" * 30)):
        (sample,) = actual.save(tmp_path / "attention", epoch, [text])
        assert (sample.id, sample.reference, sample.hypothesis) == (name, "A B", text) and sample.picture.is_file()
    files = sorted(path.name for path in (tmp_path / "attention").iterdir())
    assert files == ["epoch-0001.50-" + safe + ".png", "epoch-0001.50.npz", "epoch-0012.00-" + safe + ".png",
                     "epoch-0012.00.npz"]  # fmt: skip
    assert titles == [
        ("A B", f"{name}, epoch 1.5, CER 67%\nhypothesis: A", 0.04),
        ("A B", f"{name}, epoch 12, CER 2900%\nhypothesis: {'A B' * 20}...", 0.04),
    ]
    with np.load(tmp_path / "attention" / "epoch-0001.50.npz") as data:
        assert data["ids"].tolist() == [name] and data["text_0"] == "A B"
        assert data["weights_0"].tolist() == np.eye(4).tolist() and set(data) == {"ids", "text_0", "weights_0"}


def test_two_utterances_never_share_a_picture(tmp_path):
    actual = make_pictures(["c", "d", "a/b", "a_b"], [5] * 4, 2)
    actual.collect(torch.tensor([2, 3]), torch.eye(4).expand(2, 4, 4), torch.tensor([4, 4]), torch.tensor([4, 4]))
    names = [sample.picture.name for sample in actual.save(tmp_path / "attention", 1.0, ["A"] * 4)]
    assert names == ["epoch-0001.00-a_b.png", "epoch-0001.00-a_b-1.png"]


def test_a_title_has_only_characters_that_can_be_drawn(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(
        validate, "attention_picture", lambda path, **options: titles.append(options["title"]) or path.touch()
    )
    actual = make_pictures(["a\nb"], [5], 1)
    actual.collect(torch.tensor([0]), torch.eye(4)[None], torch.tensor([4]), torch.tensor([4]))
    actual.save(tmp_path / "attention", 2.0, ["A\tB"])
    assert titles == [r"a\nb, epoch 2, CER 33%" + "\n" + r"hypothesis: A\tB"]
