"""LAS = listener + attention + speller, with an optional CTC head on an inner layer of the listener."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from las_fast.config import ModelConfig
from las_fast.model.attention import Attended, Memory
from las_fast.model.listener import Listener
from las_fast.model.speller import Speller, SpellerState


class Output(NamedTuple):
    """What training needs of one pass."""

    logits: Tensor  # (B, U, V)
    weights: Tensor  # (B, U, T) float32
    lengths: Tensor  # (B,) encoder frames
    ctc_logits: Tensor | None  # (B, T', V)
    ctc_lengths: Tensor | None  # (B,)

    @property
    def ctc(self) -> tuple[Tensor, Tensor]:
        """The logits and lengths of CTC, of a model with that head."""
        assert self.ctc_logits is not None and self.ctc_lengths is not None
        return self.ctc_logits, self.ctc_lengths


class LAS(nn.Module):
    """Listen, Attend and Spell.

    Args:
        config: sizes.
        input_size: feature values per frame, deltas included.
        vocabulary_size: V, with <pad> (also the CTC blank), <sos> and <eos> as tokens 0, 1 and 2.
    """

    def __init__(self, config: ModelConfig, *, input_size: int, vocabulary_size: int):
        super().__init__()
        self.input_size, self.vocabulary_size, self.ctc_layer = input_size, vocabulary_size, config.ctc_layer
        self.time_reduction = config.listener.time_reduction  # feature frames in one encoder frame
        self.listener = Listener(config.listener, input_size)
        self.speller = Speller(config.speller, self.listener.output_size, vocabulary_size)
        self.ctc = nn.Linear(self.listener.output_size, vocabulary_size) if config.ctc_layer >= 0 else None

    def listen(self, features: Tensor, feature_lengths: Tensor) -> Memory:
        """Encode features (B, T, F) of feature_lengths (B,) int64 frames, each at least 1."""
        listened, lengths, tapped = self.listener(features, feature_lengths, tap=self.ctc_layer)
        memory = self.speller.attention.remember(listened, lengths)
        if tapped is None or self.ctc is None:
            return memory
        return memory._replace(ctc_logits=self.ctc(tapped[0]), ctc_lengths=tapped[1])

    def start(self, memory: Memory, beam: int) -> SpellerState:
        """Return the state before the first token, for `beam` hypotheses an utterance."""
        return self.speller.start(memory, beam)

    def step(
        self, tokens: Tensor, state: SpellerState, memory: Memory, *, weights: bool = False, backend: str = "auto"
    ) -> tuple[Tensor, Attended, SpellerState]:
        """Read tokens (B, K); return logits (B, K, V) of the next, where each listened, and the new state.

        weights False leaves out the attention weights, and keeps the frames of the largest; backend is of the ops.
        """
        return self.speller.step(tokens, state, memory, weights=weights, backend=backend)

    def forward(
        self, features: Tensor, feature_lengths: Tensor, tokens: Tensor, teacher_forcing: float = 1.0
    ) -> Output:
        """Spell tokens (B, U), each row ended by <eos> and padded by <pad>.

        teacher_forcing is the probability, drawn for every utterance and step, that the token before is the true one
        and not the model's own best.
        """
        memory = self.listen(features, feature_lengths)
        logits, weights = self.speller(memory, tokens, teacher_forcing)
        return Output(logits, weights, memory.lengths, memory.ctc_logits, memory.ctc_lengths)
