"""Additions to the Triton interpreter: faster launches, and outputs poisoned so that unwritten elements show.

Used only in a process that interprets (see process.py).
"""

import contextlib
import functools
from unittest import mock

import torch
import triton

KNOWN_VERSIONS = ("3.6", "3.7", "3.8")  # of Triton; `fast` replaces private functions
BOOL_POISON = 0x5A  # reads as True, but differs from a True that a kernel stores


@functools.cache
def fast():
    """Make interpreted launches up to five times faster, in KNOWN_VERSIONS of Triton.

    The interpreter patches triton.language at every call of a jitted function, which takes about 1 ms; once per launch
    is enough. It also copies every storage to the host and back, even if it is on the host.
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
    """Fill the results of torch.empty and similar functions with `poison` inside the block.

    Compare bools as bytes: torch.equal reads the poison of a bool as True.
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
    """Fill a tensor in place with a value that no kernel writes, and return it.

    NaN for floats, the lowest integer (the highest for unsigned types), and BOOL_POISON for bool.
    """
    if tensor.dtype == torch.bool:
        tensor.view(torch.uint8).fill_(BOOL_POISON)
    elif tensor.is_floating_point() or tensor.is_complex():
        tensor.fill_(torch.nan)
    else:
        limits = torch.iinfo(tensor.dtype)
        tensor.fill_(limits.min or limits.max)
    return tensor
