"""A plain reading of NgramModel, and small models for tests."""

from __future__ import annotations

import numpy as np
import torch

from las_fast import lm
from las_fast.ops import NgramModel

FIRST_CHARACTER = 0x4E00


class PlainAutomaton:
    """An n-gram model as dictionaries: `arcs` of each state {token: (log-probability, next state)}."""

    def __init__(self, model: NgramModel):
        rows, arcs, masks_per_row = model.rows.tolist(), model.arcs, -(-model.vocabulary_size // 32)
        log_probs, nexts = arcs.view(torch.float32)[:, 0].numpy(), arcs[:, 1].tolist()
        backoffs = model.rows.view(torch.float32)[:, -1].numpy()
        self.V, self.start, self.arcs, self.lower, self.backoffs = model.vocabulary_size, model.start, [], [], []
        for row, backoff in zip(rows, backoffs, strict=True):
            found = {}
            for mask_index in range(masks_per_row):
                tokens = [32 * mask_index + bit for bit in range(32) if row[2 * mask_index] >> bit & 1]
                found |= {v: row[2 * mask_index + 1] + i for i, v in enumerate(tokens)}
            self.arcs.append({v: (log_probs[arc], nexts[arc]) for v, arc in found.items()})
            self.lower.append(row[-2])
            self.backoffs.append(backoff)

    def arc(self, state: int, token: int) -> tuple[np.float32, int]:
        """Return the log-probability of a token in a state, and the next state."""
        total = np.float32(0)
        while token not in self.arcs[state]:
            total += self.backoffs[state]
            state = self.lower[state]
        log_prob, following = self.arcs[state][token]
        return total + log_prob, following

    def after(self, tokens, state: int = 0) -> int:
        """Return the state after tokens."""
        for token in tokens:
            state = self.arc(state, token)[1]
        return state

    def log_probs(self, state: int) -> np.ndarray:
        """Return the log-probabilities (V,) of all tokens in a state."""
        return np.array([self.arc(state, token)[0] for token in range(self.V)])


def random_model(V: int, order: int, *, seed: int = 0, sentences: int = 30, prune: int = 1) -> NgramModel:
    """Train a model of V tokens, at least 4, on random text."""
    characters = "".join(chr(FIRST_CHARACTER + i) for i in range(V - 3))
    generator = np.random.default_rng(seed)
    weights = generator.random(V - 3) ** 3
    lengths = generator.integers(1, 12, sentences)
    texts = ["".join(generator.choice(list(characters), n, p=weights / weights.sum())) for n in lengths]
    return lm.train(texts, order=order, characters=characters, prune=prune).automaton()
