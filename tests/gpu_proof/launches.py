"""Count the kernels that the decoder pass of training launches.

It runs on fake tensors, which hold no numbers: reading one raises. They are fake CPU tensors, because a CPU build of
torch cannot slice fake CUDA tensors.
"""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from gpu_proof.cases import launcher, unroll_inputs

NO_LAUNCH = {  # views, and queries that the host answers itself
    "_unsafe_view", "alias", "detach", "device", "expand", "permute", "select", "slice", "split_with_sizes", "t",
    "transpose", "unsqueeze", "view",
}  # fmt: skip


class Calls(TorchDispatchMode):
    """Appends the name of each torch op that launches a kernel."""

    def __init__(self, names):
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        name = function.name().split("::")[1].split(".")[0]
        if name not in NO_LAUNCH and not name.startswith(("empty", "new_empty")):
            self.names.append(name)
        return result


def unroll_launches(U, sampled=True, bf16=True):
    """Return the names of all kernels of a forward and of a backward pass over U tokens. Needs a compiling worker."""
    from gpu_proof.compiler import redirect_launches

    names = [[], []]
    with FakeTensorMode():
        inputs = unroll_inputs(31, 16, (24, 20), 12, 10, 40, 3, U, (40,), True, 0.5, 1.0, 0)
        inputs = tree_map_only(torch.Tensor, lambda x: torch.empty(x.shape, dtype=x.dtype, device="cpu"), inputs)
        weights, keys, values, lengths, tokens, is_sampled, masks = inputs
        is_sampled = is_sampled if sampled else is_sampled[:0]
        with redirect_launches(lambda launch: names[0].append(launch.name)), Calls(names[0]):
            logits, attention, *saved = launcher("speller_unroll")(
                weights, keys, values, lengths, tokens, is_sampled, masks, bf16, True
            )
        with redirect_launches(lambda launch: names[1].append(launch.name)), Calls(names[1]):
            launcher("speller_unroll", "speller_unroll_backward")(
                logits, attention, weights, keys, values, lengths, masks, attention, *saved, bf16
            )
    return names
