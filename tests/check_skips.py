"""Fail when a test that should have run was skipped: python tests/check_skips.py JUNIT.xml"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

SHARED = Path(__file__).resolve().parents[1] / ".." / "shared"

ALLOWED = [  # accepted reasons of skips
    r"\bno CUDA device\b",  # GPU tests need a GPU
]
if not SHARED.is_dir():
    ALLOWED.append(r"\.\./shared\b.* is absent")  # recordings that a checkout may not have


def skipped(path: str | Path) -> list[tuple[str, str]]:
    """(test, reason) of every test that did not run, including expected failures."""
    unexcused = []
    for case in ElementTree.parse(path).iter("testcase"):
        for mark in case.iter("skipped"):
            # for a file skipped as a whole, the message does not have the reason; the text does
            reason = mark.text if mark.get("message") == "collection skipped" else mark.get("message")
            unexcused.append((f"{case.get('classname')}::{case.get('name')}", reason or ""))
    return unexcused


def main(path: str) -> int:
    """Print what was skipped and why; return 1 if a reason is not allowed, or if nothing was collected."""
    cases = len(list(ElementTree.parse(path).iter("testcase")))
    if not cases:
        print(f"{path} holds no test at all")
        return 1
    wrong = 0
    for test, reason in skipped(path):
        allowed = any(re.search(pattern, reason) for pattern in ALLOWED)
        wrong += not allowed
        print(f"{'skipped' if allowed else 'SHOULD HAVE RUN'}: {test}: {reason}")
    print(f"{cases} tests, {len(skipped(path))} skipped, {wrong} of them without a good reason")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
