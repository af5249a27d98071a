"""The limits of the service, and its options on the command line."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

from las_fast.errors import InputError

MEGABYTE = 2**20
MAX_LIMIT = 1e9  # of each option
BATCH_SECONDS = 60.0  # seconds of speech decoded in one batch


@dataclass(frozen=True)
class Limits:
    """Limits on a request, and on the number of requests."""

    max_bytes: int = 25 * MEGABYTE  # of an uploaded file; OpenAI's limit
    max_seconds: float = 3600.0  # seconds of a recording
    timeout: float = 600.0  # seconds of a request, upload included
    queue: int = 64  # requests at a time, uploads included


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `parse_limits` to a parser."""
    add, plain = parser.add_argument, Limits()
    add("--max-megabytes", type=float, default=plain.max_bytes / MEGABYTE, metavar="N",
        help="maximum size of a file; larger ones get status 413 (default: 25, as OpenAI's)")  # fmt: skip
    add("--max-seconds", type=float, default=plain.max_seconds, metavar="N",
        help="maximum duration of a recording; longer ones get status 400 "
        f"(default: {plain.max_seconds:g})")  # fmt: skip
    add("--timeout", type=float, default=plain.timeout, metavar="SECONDS",
        help="maximum duration of a request; status 408 if the upload takes longer, 504 if the model does "
        f"(default: {plain.timeout:g})")  # fmt: skip
    add("--queue", type=int, default=plain.queue, metavar="N",
        help="maximum number of requests at a time, uploads included; others get status 503 "
        f"(default: {plain.queue})")  # fmt: skip


def parse_limits(options: argparse.Namespace) -> Limits:
    """Return the limits that the options set; raise InputError if one is out of range."""
    for name in ("max_megabytes", "max_seconds", "timeout", "queue"):
        value = getattr(options, name)
        if not 0 < value <= MAX_LIMIT:
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"{option} must be a number above 0 and at most {MAX_LIMIT:g}; got {value:g}")
    return Limits(math.ceil(options.max_megabytes * MEGABYTE), options.max_seconds, options.timeout, options.queue)
