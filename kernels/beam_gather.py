"""States follow their parents on a GPU: the Triton twin of las_fast/ops/beam_gather.py, which says what it means.

One launch for all states: a program copies the rows of one hypothesis, state after state. Bytes: each state is read
and written once, and nothing else moves.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def gather_kernel(states, gathered, parents, sizes, K, BLOCK: tl.constexpr):
    """Copy, for hypothesis (b, k), the row of its parent from each of the states of `sizes` numbers a row."""
    row = tl.program_id(0).to(tl.int64)
    parent = tl.load(parents + row)
    parent = tl.minimum(tl.maximum(parent, 0), K - 1)  # nobody can be told here; never read outside
    source = row // K * K + parent
    for i in tl.static_range(len(sizes)):
        for start in range(0, sizes[i], BLOCK):
            n = start + tl.arange(0, BLOCK)
            inside = n < sizes[i]
            x = tl.load(states[i] + source * sizes[i] + n, mask=inside, other=0)
            tl.store(gathered[i] + row * sizes[i] + n, x, mask=inside)


def beam_gather(states: list[Tensor], parents: Tensor) -> list[Tensor]:
    """Launch; return each state (B, K, N) gathered, as las_fast::beam_gather_triton."""
    rows = [x.contiguous() for x in states]
    gathered = [torch.empty_like(x) for x in rows]
    sizes = tuple(x.shape[2] for x in rows)
    if parents.numel() and sum(sizes):
        plain = [[_as_integers(x) for x in xs] for xs in (rows, gathered)]
        sizes = tuple(x.shape[2] for x in plain[0])
        block = min(1024, triton.next_power_of_2(max(sizes)))
        gather_kernel[parents.numel(),](
            tuple(plain[0]), tuple(plain[1]), parents.contiguous(), sizes, parents.shape[1], BLOCK=block, num_warps=4
        )
    return gathered


def _as_integers(x: Tensor) -> Tensor:
    """The same bytes as a type that Triton knows, whatever they mean."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(x.element_size(), torch.int64))
