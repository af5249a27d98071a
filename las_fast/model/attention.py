"""Masked dot-product attention: the projections around ops.masked_attention."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from las_fast.ops.masked_attention import masked_attention
from las_fast.ops.masks import padding_mask


class Memory(NamedTuple):
    """Encoded utterances: computed once, read by the speller at every token for every beam."""

    keys: Tensor  # (B, T, D) float32; bfloat16 in a search by las_fast.search.bf16
    values: Tensor  # (B, T, E), dtype of keys
    lengths: Tensor  # (B,) int64 encoder frames
    padding: Tensor  # (B, T) bool, True past the length; stored, because building it at every token is slow
    ctc_logits: Tensor | None = None  # (B, T', V)
    ctc_lengths: Tensor | None = None  # (B,) int64 CTC frames

    def padded(self, batch: int, frames: int) -> Memory:
        """Pad to `batch` utterances, the new ones of length 0, and to `frames` encoder frames.

        The CTC part keeps its ratio of CTC frames to encoder frames, rounded up.
        """
        new_rows, new_frames = batch - self.keys.shape[0], frames - self.keys.shape[1]
        keys, values = (F.pad(x, (0, 0, 0, new_frames, 0, new_rows)) for x in (self.keys, self.values))
        padding = F.pad(self.padding, (0, new_frames, 0, new_rows), value=True)
        padded = Memory(keys, values, F.pad(self.lengths, (0, new_rows)), padding)
        if self.ctc_logits is None or self.ctc_lengths is None:
            return padded
        ctc_frames = self.ctc_logits.shape[1]
        ratio = -(-ctc_frames // self.keys.shape[1])
        logits = F.pad(self.ctc_logits, (0, 0, 0, frames * ratio - ctc_frames, 0, new_rows))
        return padded._replace(ctc_logits=logits, ctc_lengths=F.pad(self.ctc_lengths, (0, new_rows)))


class AttentionRead(NamedTuple):
    """Where each hypothesis attended at one step."""

    weights: Tensor | None  # (B, K, T) float32, if requested
    peaks: Tensor  # (B, K) int64, frame of the largest weight


class Attention(nn.Module):
    """softmax(query . keys / sqrt(D)) over the valid frames, applied to the values (Luong et al. 2015, scaled)."""

    def __init__(self, listener_size: int, query_size: int, key_size: int, value_size: int):
        super().__init__()
        self.key = nn.Linear(listener_size, key_size, bias=False)  # a bias would add the same score to every frame
        self.value = nn.Linear(listener_size, value_size)
        self.query = nn.Linear(query_size, key_size)
        for layer in (self.key, self.value, self.query):
            nn.init.xavier_uniform_(layer.weight)

    def project_memory(self, encoded: Tensor, lengths: Tensor) -> Memory:
        """Project listener output (B, T, 2H) with lengths (B,) to keys and values, once per utterance."""
        # Convert here: the attention computes in float32, and converting at every token is slow.
        keys, values = self.key(encoded).float(), self.value(encoded).float()
        return Memory(keys, values, lengths, padding_mask(lengths, keys.shape[1]))

    def forward(
        self, query: Tensor, memory: Memory, *, weights: bool = True, backend: str = "auto"
    ) -> tuple[Tensor, AttentionRead]:
        """Attend with projected queries (B, K, D).

        Args:
            weights: whether to return the attention weights.
            backend: passed to ops.masked_attention.

        Returns:
            context (B, K, E), and the attention weights and peaks.
        """
        query, keys, values, lengths, padding = query.to(memory.keys.dtype), *memory[:4]
        context, *read = masked_attention(
            query, keys, values, lengths, weights=weights, peaks=True, padding=padding, backend=backend
        )
        return context, AttentionRead(*read)
