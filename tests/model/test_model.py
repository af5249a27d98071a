"""The whole model: equal results alone and in a batch, and a gradient for every parameter."""

import importlib
from dataclasses import replace

import pytest
import torch

from las_fast.config import ListenerConfig, ModelConfig, SpellerConfig
from las_fast.model.las import LAS
from las_fast.model.layers import BatchPart, running_part
from las_fast.text import EOS, PAD, SOS
from las_fast.training.losses import training_loss

SMALL = ModelConfig(
    listener=ListenerConfig(conv_channels=(8,), conv_kernels=(3,), conv_strides=(2,), lstm_size=6, pyramids=2),
    speller=SpellerConfig(key_size=7, value_size=5, embedding_size=6, lstm_sizes=(8, 9)),
    ctc_layer=1,
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LAS(SMALL, input_size=4, vocabulary_size=31)


def test_padding_and_other_utterances_do_not_change_the_output(model):
    model.eval()
    torch.manual_seed(1)
    features, lengths = torch.randn(3, 50, 4), torch.tensor([50, 31, 1])
    tokens = torch.randint(3, 31, (3, 6))
    together = model(features, lengths, tokens)
    for b in range(3):
        alone = model(features[b : b + 1, : lengths[b]], lengths[b : b + 1], tokens[b : b + 1])
        frames = int(alone.lengths[0])
        assert frames == together.lengths[b]
        torch.testing.assert_close(together.logits[b], alone.logits[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(together.weights[b, :, :frames], alone.weights[0], rtol=1e-5, atol=1e-6)
        assert (together.weights[b, :, frames:] == 0).all()


@pytest.mark.parametrize("inner_ctc_layer", [-1, 0])
def test_every_parameter_gets_a_finite_gradient(inner_ctc_layer):
    torch.manual_seed(0)
    model = LAS(replace(SMALL, inner_ctc_layer=inner_ctc_layer), input_size=4, vocabulary_size=31)
    tokens = torch.tensor([[5, 6, 7, EOS], [8, EOS, PAD, PAD]])
    output = model(torch.randn(2, 60, 4), torch.tensor([60, 1]), tokens)
    loss, _ = training_loss(
        output, tokens, torch.tensor([4, 2]), label_smoothing=0.1, ctc_weight=0.5, guided_weight=1.0, guided_width=0.1
    )
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_keys_and_values_are_projected_once_for_all_tokens(model):
    calls = []
    for layer in (model.speller.attention.key, model.speller.attention.value):
        layer.register_forward_hook(lambda *a: calls.append(1))
    model(torch.randn(2, 60, 4), torch.tensor([60, 9]), torch.randint(3, 31, (2, 12)))
    assert len(calls) == 2


def test_embedding_and_output_share_their_weights(model):
    assert [n for n, p in model.named_parameters() if p.shape == (31, 6)] == ["speller.embedding.weight"]


def test_a_model_has_a_ctc_head_only_on_request(model):
    plain = LAS(replace(SMALL, ctc_layer=-1), input_size=4, vocabulary_size=31)
    assert [name for name in model.state_dict() if name.startswith("ctc")] == ["ctc.weight", "ctc.bias"]
    assert plain.ctc is None and not [name for name in plain.state_dict() if name.startswith("ctc")]


def test_an_inner_ctc_head_reads_its_layer_in_training_and_nothing_in_decoding():
    torch.manual_seed(0)
    model = LAS(replace(SMALL, inner_ctc_layer=0), input_size=4, vocabulary_size=31).eval()
    features, lengths = torch.randn(2, 30, 4), torch.tensor([30, 13])
    output = model(features, lengths, torch.tensor([[5, EOS], [6, EOS]]))
    tapped, frames = model.listener(features, lengths, taps=[0])[2][0]
    assert torch.equal(output.inner_ctc[0], model.inner_ctc(tapped)) and torch.equal(output.inner_ctc[1], frames)
    assert frames.tolist() == [15, 7] and output.ctc_lengths.tolist() == [8, 4]
    before = model.listen(features, lengths)
    torch.nn.init.zeros_(model.inner_ctc.weight)
    assert all(torch.equal(a, b) for a, b in zip(before, model.listen(features, lengths), strict=True))


def test_attention_projections_are_xavier_initialised(model):
    attention = model.speller.attention
    for layer in (attention.key, attention.value, attention.query):
        rows, columns = layer.weight.shape
        bound = (6 / (rows + columns)) ** 0.5
        assert 0.85 * bound < layer.weight.abs().max() <= bound


@pytest.mark.parametrize("ctc", [False, True])
def test_a_memory_is_padded_with_frames_that_are_masked(model, ctc):
    model.eval()
    kind = model if ctc else LAS(replace(SMALL, ctc_layer=-1), input_size=4, vocabulary_size=31).eval()
    memory = kind.listen(torch.randn(2, 30, 4), torch.tensor([30, 13]))
    frames, ctc_frames = memory.keys.shape[1], None if memory.ctc_logits is None else memory.ctc_logits.shape[1]
    padded = memory.padded(3, frames + 2)
    assert padded.keys.shape[:2] == padded.values.shape[:2] == padded.padding.shape == (3, frames + 2)
    for name in ("keys", "values"):
        whole = getattr(padded, name)
        assert torch.equal(whole[:2, :frames], getattr(memory, name))
        assert not whole[2].any() and not whole[:, frames:].any()
    assert padded.lengths.tolist() == [*memory.lengths.tolist(), 0]
    assert torch.equal(padded.padding[:2, :frames], memory.padding)
    assert padded.padding[2].all() and padded.padding[:, frames:].all()
    if ctc:
        times = -(-ctc_frames // frames)
        assert padded.ctc_logits.shape[:2] == (3, times * (frames + 2)) and times == 2
        assert torch.equal(padded.ctc_logits[:2, :ctc_frames], memory.ctc_logits)
        assert padded.ctc_lengths.tolist() == [*memory.ctc_lengths.tolist(), 0]
    else:
        assert padded.ctc_logits is None and padded.ctc_lengths is None


def test_a_memory_of_one_frame_is_padded_like_a_longer_one(model):
    memory = model.eval().listen(torch.randn(1, 3, 4), torch.tensor([3]))
    assert memory.keys.shape[1] == 1 and memory.ctc_logits.shape[1] == 1
    assert memory.padded(2, 3).ctc_logits.shape[:2] == (2, 3)


def test_attention_runs_on_the_requested_backend_and_returns_weights_by_default(model, monkeypatch):
    attention, calls = model.speller.attention, []
    module = importlib.import_module("las_fast.model.attention")
    masked = module.masked_attention

    def spy(*args, **options):
        calls.append(options)
        return masked(*args, **options)

    monkeypatch.setattr(module, "masked_attention", spy)
    memory = model.listen(torch.randn(1, 30, 4), torch.tensor([30]))
    _, attended = attention(torch.randn(1, 2, 7), memory, backend="reference")
    assert calls[0]["backend"] == "reference" and attended.weights.shape == (1, 2, memory.keys.shape[1])
    assert calls[0]["padding"] is memory.padding
    assert attention(torch.randn(1, 2, 7), memory, weights=False)[1].weights is None


def test_the_ctc_head_is_on_the_configured_layer(model):
    memory = model.listen(torch.randn(1, 64, 4), torch.tensor([64]))
    assert memory.ctc_lengths.tolist() == [16] and memory.lengths.tolist() == [8]
    plain = LAS(ModelConfig(listener=SMALL.listener, speller=SMALL.speller), input_size=4, vocabulary_size=31)
    assert plain.listen(torch.randn(1, 64, 4), torch.tensor([64])).ctc_logits is None


def test_a_beam_uses_the_same_memory_as_one_hypothesis(model):
    model.eval()
    memory = model.listen(torch.randn(2, 40, 4), torch.tensor([40, 17]))
    one = model.step(torch.full((2, 1), SOS), model.start(memory, 1), memory, weights=True)
    four = model.step(torch.full((2, 4), SOS), model.start(memory, 4), memory, weights=True)
    assert four[0].shape == (2, 4, 31)
    for k in range(4):
        torch.testing.assert_close(four[0][:, k], one[0][:, 0])
        torch.testing.assert_close(four[1].weights[:, k], one[1].weights[:, 0])


def test_a_few_utterances_can_be_memorised(model):
    torch.manual_seed(0)
    features, lengths = torch.randn(2, 40, 4), torch.tensor([40, 30])
    tokens = torch.tensor([[5, 6, 7, EOS], [8, 9, EOS, PAD]])
    optimiser = torch.optim.Adam(model.parameters(), 2e-2)
    model.eval()
    for _ in range(120):
        loss, _ = training_loss(
            model(features, lengths, tokens),
            tokens,
            torch.tensor([4, 3]),
            label_smoothing=0.0,
            ctc_weight=0.0,
            guided_weight=0.0,
            guided_width=0.1,
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.05


@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_the_parts_of_a_batch_draw_the_dropout_and_tokens_of_the_whole(model, size):
    features, lengths, tokens = torch.randn(5, 20, 4), torch.tensor([20, 9, 7, 5, 4]), torch.randint(3, 31, (5, 6))
    torch.manual_seed(7)
    whole = model(features, lengths, tokens, 0.5)
    for start in range(0, 5, size):
        rows = slice(start, start + size)
        torch.manual_seed(7)
        with running_part(BatchPart(start, 5)):
            part = model(features[rows], lengths[rows], tokens[rows], 0.5)
        torch.testing.assert_close(part.logits, whole.logits[rows], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(part.ctc_logits, whole.ctc_logits[rows], rtol=1e-5, atol=1e-5)
