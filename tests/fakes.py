"""A made-up language model for tests of the search: small enough to score every text there is."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from las_fast.config import DecodingConfig
from las_fast.model.attention import AttentionRead
from las_fast.ops import padding_mask
from las_fast.text import EOS, PAD, SOS

V = 5  # <pad>, <sos>, <eos> and two characters


class FakeMemory(NamedTuple):
    seeds: Tensor  # (B,) int64: what each utterance sounds like
    lengths: Tensor  # (B,)
    frames: int

    @property
    def padding(self) -> Tensor:
        return padding_mask(self.lengths, self.frames)

    def padded(self, batch: int, frames: int) -> FakeMemory:
        rows = (0, batch - len(self.lengths))
        return FakeMemory(F.pad(self.seeds, rows), F.pad(self.lengths, rows), frames)


class FakeState(NamedTuple):
    history: Tensor  # (B, K) int64: a number for the tokens read so far

    def gather(self, parents: Tensor, *, backend: str = "auto") -> FakeState:
        return FakeState(self.history.gather(1, parents))


class FakeModel:
    """Logits are a fixed function of the utterance and of everything read so far."""

    time_reduction = 1

    def __init__(self, vocabulary: int = V, eos: float = 0.0, ties: bool = False):
        self.vocabulary = self.vocabulary_size = vocabulary
        self.eos, self.ties, self.steps = eos, ties, 0

    def start(self, memory: FakeMemory, beam: int) -> FakeState:
        return FakeState(memory.seeds[:, None].repeat(1, beam))

    def step(self, tokens: Tensor, state: FakeState, memory: FakeMemory, *, weights: bool = False, backend="auto"):
        self.steps += 1
        history = (state.history * 31 + tokens * 7 + 1) % 10007
        spread = (history[..., None] * (torch.arange(self.vocabulary) * 13 + 5)) % 97
        logits = torch.zeros(spread.shape) if self.ties else spread.float() / 20
        logits[..., [PAD, SOS]] = -1e4
        logits[..., EOS] += self.eos
        peaks = history % memory.lengths.clamp(min=1)[:, None]
        spikes = F.one_hot(peaks, memory.frames).float() if weights else None
        return logits, AttentionRead(spikes, peaks), FakeState(history)


def memory(seeds: list[int], lengths: list[int], frames: int | None = None) -> FakeMemory:
    return FakeMemory(torch.tensor(seeds), torch.tensor(lengths), frames or max(lengths))


def config(**fields) -> DecodingConfig:
    plain = {"beam": 4, "length_penalty": 0.0, "maximum_share": 1.0, "maximum_extra": 0}
    return DecodingConfig(**{**plain, **fields})
