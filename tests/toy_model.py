"""A toy model for tests of the search: small enough to score every possible text."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from las_fast.config import DecodingConfig
from las_fast.model.attention import AttentionRead
from las_fast.ops import padding_mask
from las_fast.text import EOS, PAD, SOS

V = 5  # <pad>, <sos>, <eos> and two characters


class ToyMemory(NamedTuple):
    seeds: Tensor  # (B,) int64; they determine the logits of each utterance
    lengths: Tensor  # (B,)
    frames: int

    @property
    def padding(self) -> Tensor:
        return padding_mask(self.lengths, self.frames)

    def padded(self, batch: int, frames: int) -> ToyMemory:
        rows = (0, batch - len(self.lengths))
        return ToyMemory(F.pad(self.seeds, rows), F.pad(self.lengths, rows), frames)


class ToyState(NamedTuple):
    history: Tensor  # (B, K) int64, a hash of the tokens so far

    def gather(self, parents: Tensor, *, backend: str = "auto") -> ToyState:
        return ToyState(self.history.gather(1, parents))


class ToyModel:
    """A model whose logits are a fixed function of the utterance and of all tokens so far."""

    time_reduction = 1

    def __init__(self, vocabulary: int = V, eos: float = 0.0, ties: bool = False):
        self.vocabulary = self.vocabulary_size = vocabulary
        self.eos, self.ties, self.steps = eos, ties, 0

    def start(self, memory: ToyMemory, beam: int) -> ToyState:
        return ToyState(memory.seeds[:, None].repeat(1, beam))

    def step(self, tokens: Tensor, state: ToyState, memory: ToyMemory, *, weights: bool = False, backend="auto"):
        self.steps += 1
        history = (state.history * 31 + tokens * 7 + 1) % 10007
        spread = (history[..., None] * (torch.arange(self.vocabulary) * 13 + 5)) % 97
        logits = torch.zeros(spread.shape) if self.ties else spread.float() / 20
        logits[..., [PAD, SOS]] = -1e4
        logits[..., EOS] += self.eos
        peaks = history % memory.lengths.clamp(min=1)[:, None]
        spikes = F.one_hot(peaks, memory.frames).float() if weights else None
        return logits, AttentionRead(spikes, peaks), ToyState(history)


def memory(seeds: list[int], lengths: list[int], frames: int | None = None) -> ToyMemory:
    return ToyMemory(torch.tensor(seeds), torch.tensor(lengths), frames or max(lengths))


def config(**fields) -> DecodingConfig:
    plain = {"beam": 4, "beam_threshold": 0.0, "length_penalty": 0.0, "maximum_share": 1.0, "maximum_extra": 0}
    return DecodingConfig(**{**plain, **fields})


def log_probability(model: ToyModel, one: ToyMemory, tokens: tuple[int, ...]) -> list[float]:
    """The log-probability of each token given the previous ones."""
    state, before, result = model.start(one, 1), SOS, []
    for token in tokens:
        logits, _, state = model.step(torch.tensor([[before]]), state, one)
        result.append(float(logits.log_softmax(-1)[0, 0, token]))
        before = token
    return result


def all_texts(model: ToyModel, one: ToyMemory, longest: int, penalty: float) -> list[tuple[float, float, tuple]]:
    """(rank, score, tokens) of every text up to the maximum length, best first."""
    texts = []
    for n in range(longest + 1):
        for text in itertools.product(range(3, model.vocabulary), repeat=n):
            score = sum(log_probability(model, one, (*text, EOS)))
            texts.append((score / (n + 1) ** penalty, score, text))
    return sorted(texts, reverse=True)
