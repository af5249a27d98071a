"""Fakes that several test files share, for monkeypatching."""

from __future__ import annotations


def raising(error: BaseException):
    """A function of any arguments that raises `error`."""

    def fail(*_, **__):
        raise error

    return fail
