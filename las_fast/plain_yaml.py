"""YAML as people mean it: a plain word or number keeps its text, and the setting that it is for says what it means.

YAML 1.1, which PyYAML reads, takes 010 for 8, 1:30 for 90, no for False and 2020-01-01 for a date. Here each plain
value is a `Plain`, which `number` and `truth` turn into what a setting wants, or refuse. A key may be there once.
"""

from __future__ import annotations

import re
import reprlib
from typing import Any

import yaml

from las_fast.errors import InputError


class Plain(str):
    """A value that is written without quotes, as it is written; `line` is where."""

    line: int

    def __new__(cls, text: str, line: int = 0):
        self = super().__new__(cls, text)
        self.line = line
        return self

    def __repr__(self) -> str:
        return str(self) if TYPED.fullmatch(self) else super().__repr__()


TYPED = re.compile(r"[-+.\d][-+.\d_:eExXobaAinfNF]*|true|false|yes|no|on|off", re.IGNORECASE)  # shown without quotes
WHOLE = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
REAL = re.compile(r"[-+]?((0|[1-9][0-9_]*)(\.[0-9_]*)?|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?")
SPECIAL = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf", ".nan": "nan"}
TRUTHS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
EMPTY = ("", "~", "null", "Null", "NULL")

_short = reprlib.Repr()
_short.maxlevel, _short.maxlist, _short.maxdict, _short.maxstring, _short.maxother = 2, 4, 4, 80, 80


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 (PyYAML's own name): nothing is guessed from its looks

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        seen: dict[str, int] = {}
        for key, _ in getattr(node, "value", ()):
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and seen.setdefault(key.value, line) != line:
                first = seen[key.value]
                raise InputError(f"{key.value} is set twice, in lines {first} and {line}; leave one of them out")
        return super().construct_mapping(node, deep)


def _plain(loader: _Loader, node: yaml.ScalarNode) -> Any:
    text = loader.construct_scalar(node)
    if node.style is not None:  # it is quoted
        return text
    return None if text in EMPTY else Plain(text, node.start_mark.line + 1)


_Loader.add_constructor("tag:yaml.org,2002:str", _plain)


def load(text: str, where: str) -> Any:
    """Return the dicts, lists, texts and Plain values of a YAML document, None where it is empty.

    Raises:
        InputError: it is not YAML, sets a key twice, or is nested too deeply; `where` names it.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader  # noqa: S506
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except RecursionError:
        raise InputError(f"{where} is nested too deeply; give a file of settings") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, OverflowError) as error:  # of explicit tags too
        raise InputError(f"{where} is not YAML: {' '.join(str(error).split())}") from None


def number(text: Plain, kind: type) -> int | float | None:
    """Return a plain value as a number of `kind`, None where it is none or could mean several."""
    if kind is float and text.lower() in SPECIAL:
        return float(SPECIAL[text.lower()])
    if not (WHOLE if kind is int else REAL).fullmatch(text):
        return None
    try:
        return kind(text)
    except ValueError:  # 1__0, or more digits than Python converts
        return None


def truth(text: Plain) -> bool | None:
    """Return a plain value as true or false, None where it is neither."""
    return TRUTHS.get(text.lower())


def got(value: Any) -> str:
    """Return a value for an error, short whatever it is, with its line where that is known."""
    shown = repr(value) if isinstance(value, Plain) and len(value) <= 80 else _short.repr(value)
    line = getattr(value, "line", 0)
    return f"{shown} (line {line})" if line else shown
