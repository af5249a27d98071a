"""Masked dot-product attention: projections around ops.masked_attention."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from las_fast.ops.masked_attention import masked_attention
from las_fast.ops.masks import padding_mask


class Memory(NamedTuple):
    """What the speller reads of an utterance: made once, shared by every token and every beam."""

    keys: Tensor  # (B, T, D)
    values: Tensor  # (B, T, E)
    lengths: Tensor  # (B,) encoder frames
    padding: Tensor  # (B, T) bool, True past the length: made once, not at every token
    ctc_logits: Tensor | None = None  # (B, T', V)
    ctc_lengths: Tensor | None = None  # (B,)

    def padded(self, batch: int, frames: int) -> Memory:
        """Return it with utterances of length 0 and padded frames added up to that size.

        Frames of the CTC part stay as many times those of the rest as they are now, rounded up.
        """
        rows, later = batch - self.keys.shape[0], frames - self.keys.shape[1]
        keys, values = (F.pad(x, (0, 0, 0, later, 0, rows)) for x in (self.keys, self.values))
        padding = F.pad(self.padding, (0, later, 0, rows), value=True)
        padded = Memory(keys, values, F.pad(self.lengths, (0, rows)), padding)
        if self.ctc_logits is None or self.ctc_lengths is None:
            return padded
        heard = self.ctc_logits.shape[1]
        more = frames * -(-heard // self.keys.shape[1]) - heard
        logits = F.pad(self.ctc_logits, (0, 0, 0, more, 0, rows))
        return padded._replace(ctc_logits=logits, ctc_lengths=F.pad(self.ctc_lengths, (0, rows)))


class Attended(NamedTuple):
    """Where each hypothesis listened at one step."""

    weights: Tensor | None  # (B, K, T) float32, where asked for
    peaks: Tensor  # (B, K) int64, the frame of the largest weight


class Attention(nn.Module):
    """softmax(query . keys / sqrt(D)) over the valid frames, applied to the values (Luong et al. 2015, scaled)."""

    def __init__(self, listener_size: int, query_size: int, key_size: int, value_size: int):
        super().__init__()
        self.key = nn.Linear(listener_size, key_size, bias=False)  # a bias would add the same score to every frame
        self.value = nn.Linear(listener_size, value_size)
        self.query = nn.Linear(query_size, key_size)
        for layer in (self.key, self.value, self.query):
            nn.init.xavier_uniform_(layer.weight)

    def remember(self, listened: Tensor, lengths: Tensor) -> Memory:
        """Project listener outputs (B, T, F) to keys and values, once for the whole utterance."""
        # float32, since the attention computes in it: otherwise every token would convert them again.
        keys, values = self.key(listened).float(), self.value(listened).float()
        return Memory(keys, values, lengths, padding_mask(lengths, keys.shape[1]))

    def forward(
        self, query: Tensor, memory: Memory, *, weights: bool = True, backend: str = "auto"
    ) -> tuple[Tensor, Attended]:
        """Return the context (B, K, E) of projected queries (B, K, D), and where it is from."""
        query, keys, values, lengths, padding = query.to(memory.keys.dtype), *memory[:4]
        context, *attended = masked_attention(
            query, keys, values, lengths, weights=weights, peaks=True, padding=padding, backend=backend
        )
        return context, Attended(*attended)
