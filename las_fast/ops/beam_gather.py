"""Reorder recurrent states by back-pointers after a step of beam search, all states in one call.

gathered[b, k] = state[b, parents[b, k]]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from las_fast.ops import backends


def beam_gather(states: Sequence[Tensor], parents: Tensor, *, backend: str = "auto") -> tuple[Tensor, ...]:
    """Give each hypothesis k the state of hypothesis parents[b, k]. Not differentiable.

    Args:
        states:  each (B, K, N), of any dtype and any N; the fast backends copy a state whose rows are not contiguous.
        parents: (B, K) int64 from 0 to K-1.
        backend: "auto", "reference", "triton" or "cpp".

    Returns:
        The gathered states, contiguous, in the order of `states`.

    Raises:
        ValueError: shapes, dtypes or devices disagree.
        RuntimeError: the named backend is not available here; on the CPU, a parent is not from 0 to K-1. Triton
            clamps it: a kernel cannot raise.
    """
    _check(states, parents)
    states = [backends.detached(x) for x in states]
    chosen = backends.choose("beam_gather", backend, parents.device)
    if chosen == "reference":
        return _reference(states, parents)
    return tuple(getattr(torch.ops.las_fast, f"beam_gather_{chosen}")(states, parents))


def _reference(states: Sequence[Tensor], parents: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.gather(1, parents[:, :, None].expand(-1, -1, x.shape[2])) for x in states)


def _check(states: Sequence[Tensor], parents: Tensor) -> None:
    if parents.ndim != 2 or parents.dtype != torch.int64:
        raise ValueError(f"parents must be (B, K) int64; got {tuple(parents.shape)} {parents.dtype}")
    for i, state in enumerate(states):
        if state.ndim != 3 or state.shape[:2] != parents.shape or state.device != parents.device:
            raise ValueError(
                f"states[{i}] must be ({parents.shape[0]}, {parents.shape[1]}, N) on {parents.device} like parents; "
                f"got {tuple(state.shape)} on {state.device}"
            )


def _fake(states: list[Tensor], parents: Tensor) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in states]


backends.register("beam_gather", "(Tensor[] states, Tensor parents) -> Tensor[]", _fake)
