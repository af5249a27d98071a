"""Additions to the Triton interpreter: speed, and outputs that show where nothing was written.

Used only in a process that interprets (see process.py).
"""

import contextlib
import functools
from unittest import mock

import torch
import triton

KNOWN_VERSIONS = ("3.6", "3.7", "3.8")  # of Triton: `fast` replaces private functions of these
BOOL_POISON = 0x5A  # a byte that reads as True and differs from a written True


@functools.cache
def fast():
    """Make interpreted launches up to five times faster, in KNOWN_VERSIONS of Triton.

    The interpreter patches triton.language again for every call between jitted functions, about 1 ms each: once per
    launch is enough. It also copies every storage to the host and back, even those that are on the host.
    """
    if not triton.__version__.startswith(KNOWN_VERSIONS):
        return
    from triton.runtime import interpreter

    patched = set()  # globals of functions whose triton.language is patched for the current launch
    launch = interpreter.GridExecutor.__call__
    restore = interpreter.GridExecutor._restore_args_dev

    def call_nested(self, *args, **kwargs):
        if id(self.fn.__globals__) not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(id(self.fn.__globals__))
        return self.rewrite()(*args, **kwargs)

    def call_launch(self, *args, **kwargs):
        patched.clear()  # the previous launch has restored triton.language
        return launch(self, *args, **kwargs)

    def restore_unless_on_the_host(self, args_dev, args_hst, kwargs, kwargs_hst):
        tensors = [arg for arg in [*args_dev, *kwargs.values()] if isinstance(arg, torch.Tensor)]
        if any(tensor.device.type not in ("cpu", "meta") for tensor in tensors):
            restore(self, args_dev, args_hst, kwargs, kwargs_hst)

    interpreter.InterpretedFunction.__call__ = call_nested
    interpreter.GridExecutor.__call__ = call_launch
    interpreter.GridExecutor._restore_args_dev = restore_unless_on_the_host


@contextlib.contextmanager
def poisoned():
    """Fill the results of torch.empty and its relatives with values that no kernel writes, inside the block.

    NaN for floats, the lowest integer (the highest where the lowest is 0), and for bool a byte that is neither 0 nor 1:
    compare bools as bytes, torch.equal takes that byte for True.
    """
    with contextlib.ExitStack() as stack:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (torch.Tensor, "new_empty"),
            (torch.Tensor, "new_empty_strided"),
        ):
            stack.enter_context(mock.patch.object(owner, name, _poisoning(getattr(owner, name))))
        yield


def _poisoning(allocate):
    def allocate_poisoned(*args, **kwargs):
        return poison(allocate(*args, **kwargs))

    return allocate_poisoned


def poison(tensor):
    """Fill a tensor, in place, with the value of its type that stands for "never written"; returns it."""
    if tensor.dtype == torch.bool:
        tensor.view(torch.uint8).fill_(BOOL_POISON)
    elif tensor.is_floating_point() or tensor.is_complex():
        tensor.fill_(torch.nan)
    else:
        limits = torch.iinfo(tensor.dtype)
        tensor.fill_(limits.min or limits.max)
    return tensor
