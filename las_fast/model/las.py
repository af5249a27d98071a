"""LAS = listener + attention + speller, with optional CTC heads on layers of the listener."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from las_fast.config import ModelConfig
from las_fast.model.attention import AttentionRead, Memory
from las_fast.model.listener import Listener, Taps
from las_fast.model.speller import Speller, SpellerState


class Output(NamedTuple):
    """The result of a training pass."""

    logits: Tensor  # (B, U, V)
    weights: Tensor  # (B, U, T) float32 attention weights
    lengths: Tensor  # (B,) int64 encoder frames
    ctc_logits: Tensor | None  # (B, T', V)
    ctc_lengths: Tensor | None  # (B,) int64 CTC frames
    inner_ctc: tuple[Tensor, Tensor] | None = None  # logits and lengths of the head on model.inner_ctc_layer

    @property
    def ctc(self) -> tuple[Tensor, Tensor]:
        """CTC logits and lengths; only for a model with a CTC head."""
        assert self.ctc_logits is not None and self.ctc_lengths is not None
        return self.ctc_logits, self.ctc_lengths


class LAS(nn.Module):
    """Listen, Attend and Spell (Chan et al. 2016).

    Args:
        config: layer sizes.
        input_size: feature values per frame, deltas included.
        vocabulary_size: V; tokens 0, 1 and 2 are <pad> (also the CTC blank), <sos> and <eos>.
    """

    def __init__(self, config: ModelConfig, *, input_size: int, vocabulary_size: int):
        super().__init__()
        self.input_size, self.vocabulary_size, self.ctc_layer = input_size, vocabulary_size, config.ctc_layer
        self.time_reduction = config.listener.time_reduction  # feature frames per encoder frame
        # feature frames per CTC frame, if there is a CTC head
        self.ctc_time_reduction = config.listener.reduction_at(max(0, config.ctc_layer))
        self.listener = Listener(config.listener, input_size)
        self.speller = Speller(config.speller, self.listener.output_size, vocabulary_size)
        self.inner_ctc_layer = config.inner_ctc_layer
        self.ctc = self._head(config.ctc_layer)
        self.inner_ctc = self._head(config.inner_ctc_layer)

    def _head(self, layer: int) -> nn.Linear | None:
        return nn.Linear(self.listener.output_size, self.vocabulary_size) if layer >= 0 else None

    def listen(self, features: Tensor, feature_lengths: Tensor) -> Memory:
        """Encode features (B, T, F) float32 with feature_lengths (B,) int64, each at least 1."""
        return self._listen(features, feature_lengths, (self.ctc_layer,))[0]

    def _listen(self, features: Tensor, feature_lengths: Tensor, taps: Sequence[int]) -> tuple[Memory, Taps]:
        encoded, lengths, tapped = self.listener(features, feature_lengths, taps)
        memory = self.speller.attention.project_memory(encoded, lengths)
        if self.ctc is not None:
            x, frames = tapped[self.ctc_layer]
            memory = memory._replace(ctc_logits=self.ctc(x), ctc_lengths=frames)
        return memory, tapped

    def start(self, memory: Memory, beam: int) -> SpellerState:
        """Return the state before the first token, for `beam` hypotheses per utterance."""
        return self.speller.start(memory, beam)

    def step(
        self, tokens: Tensor, state: SpellerState, memory: Memory, *, weights: bool = False, backend: str = "auto"
    ) -> tuple[Tensor, AttentionRead, SpellerState]:
        """Advance every hypothesis by one token.

        Args:
            tokens: (B, K) int64, the last token of each hypothesis.
            state: from `start` or the previous step.
            memory: from `listen`.
            weights: whether to return the attention weights; peaks are always returned.
            backend: passed to the ops.

        Returns:
            logits (B, K, V) of the next token, the attention weights and peaks, and the new state.
        """
        return self.speller.step(tokens, state, memory, weights=weights, backend=backend)

    def forward(
        self, features: Tensor, feature_lengths: Tensor, tokens: Tensor, teacher_forcing: float = 1.0
    ) -> Output:
        """Run a training pass.

        Args:
            features: (B, T, F) float32.
            feature_lengths: (B,) int64, each at least 1.
            tokens: (B, U) int64 targets, each row ended by <eos> and padded with <pad>.
            teacher_forcing: probability, per utterance and step, that the speller reads the true previous token rather
                than its own prediction.
        """
        memory, tapped = self._listen(features, feature_lengths, (self.ctc_layer, self.inner_ctc_layer))
        logits, weights = self.speller(memory, tokens, teacher_forcing)
        inner_ctc = None
        if self.inner_ctc is not None:
            x, frames = tapped[self.inner_ctc_layer]
            inner_ctc = self.inner_ctc(x), frames
        return Output(logits, weights, memory.lengths, memory.ctc_logits, memory.ctc_lengths, inner_ctc)
