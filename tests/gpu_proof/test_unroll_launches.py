"""The decoder pass of training launches few kernels per token and never waits for the device."""

from collections import Counter

import pytest

from gpu_proof.launches import unroll_launches
from gpu_proof.process import compiled

FORWARD = Counter(cell_kernel=2, attend_kernel=1)  # per token, with two cells
SAMPLING = Counter(choose_kernel=1)
BACKWARD = Counter(input_gradient_kernel=1, attend_gradient_kernel=1, cell_gradient_kernel=2)
MAX_OUTSIDE = 60, 110  # launches of the forward and of the backward pass outside the loop over tokens


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("sampled", [False, True], ids=["forced", "sampled"])
def test_a_token_takes_at_most_four_launches_forward_and_four_backward(sampled, bf16):
    short, long = (compiled(unroll_launches, U, sampled, bf16) for U in (3, 5))
    per_token = FORWARD + SAMPLING if sampled else FORWARD, BACKWARD
    for before, after, launches in zip(short, long, per_token, strict=True):
        assert Counter(after) - Counter(before) == launches + launches
        assert launches.total() <= 4
    for names, limit in zip(short, MAX_OUTSIDE, strict=True):
        assert sum(not name.endswith("_kernel") for name in names) <= limit
