"""States reordered by back-pointers on a GPU. las_fast/ops/beam_gather.py defines the operation.

One launch serves all states. Each program copies the rows of one hypothesis, state after state. Bytes: each state is
read and written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # values of a row per iteration, at most


@triton.jit
def gather_kernel(states, gathered, parents, sizes, K, BLOCK: tl.constexpr):
    """Copy the parent's row of every state to hypothesis (b, k). `sizes` has the row size of each state."""
    row = tl.program_id(0).to(tl.int64)
    parent = tl.load(parents + row)
    parent = tl.minimum(tl.maximum(parent, 0), K - 1)  # a kernel cannot raise: clamp
    source = row // K * K + parent
    for i in tl.static_range(len(sizes)):
        for start in range(0, sizes[i], BLOCK):
            # (BLOCK,)
            n = start + tl.arange(0, BLOCK)
            inside = n < sizes[i]
            x = tl.load(states[i] + source * sizes[i] + n, mask=inside, other=0)
            tl.store(gathered[i] + row * sizes[i] + n, x, mask=inside)


def beam_gather(states: list[Tensor], parents: Tensor) -> list[Tensor]:
    """Launch the kernel; the implementation of las_fast::beam_gather_triton."""
    rows = [x.contiguous() for x in states]
    gathered = [torch.empty_like(x) for x in rows]
    sizes = tuple(x.shape[2] for x in rows)
    if sum(sizes):
        sources, targets = ([_as_integers(x) for x in xs] for xs in (rows, gathered))
        sizes = tuple(x.shape[2] for x in sources)
        block = min(BLOCK, triton.next_power_of_2(max(sizes)))
        gather_kernel[parents.numel(),](
            tuple(sources), tuple(targets), parents.contiguous(), sizes, parents.shape[1], BLOCK=block
        )
    return gathered


def _as_integers(x: Tensor) -> Tensor:
    """View x as integers of the same size: Triton does not support every dtype."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(x.element_size(), torch.int64))
