"""YAML without guessed types: an unquoted value stays text until the type of its setting is known.

YAML 1.1, which PyYAML reads, turns 010 into 8, 1:30 into 90, no into False and 2020-01-01 into a date. Here every
unquoted value is a `Plain` string, which `parse_number` and `parse_bool` convert or reject. Duplicate keys are errors.
"""

from __future__ import annotations

import re
import reprlib
from typing import Any

import yaml

from las_fast.errors import InputError


class Plain(str):
    """An unquoted value as written; `line` is its line number, or 0 if unknown."""

    line: int

    def __new__(cls, text: str, line: int = 0):
        self = super().__new__(cls, text)
        self.line = line
        return self

    def __repr__(self) -> str:
        return str(self) if NOT_TEXT.fullmatch(self) else super().__repr__()


# Values that look like numbers or booleans: errors print them without quotes.
NOT_TEXT = re.compile(r"[-+.\d][-+.\d_:eExXobaAinfNF]*|true|false|yes|no|on|off", re.IGNORECASE)
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
FLOAT = re.compile(r"[-+]?((0|[1-9][0-9_]*)(\.[0-9_]*)?|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?")
SPECIAL_FLOATS = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf", ".nan": "nan"}
BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NULLS = ("", "~", "null", "Null", "NULL")

_short = reprlib.Repr()
_short.maxlevel, _short.maxlist, _short.maxdict, _short.maxstring, _short.maxother = 2, 4, 4, 80, 80


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 (PyYAML's name): no guessed types

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        seen: dict[str, int] = {}
        for key, _ in getattr(node, "value", ()):
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                continue
            if first := seen.get(key.value):
                place = f"line {line}" if first == line else f"lines {first} and {line}"
                raise InputError(f"{key.value} is set twice, in {place}; remove one of them")
            seen[key.value] = line
        return super().construct_mapping(node, deep)


def _plain(loader: _Loader, node: yaml.ScalarNode) -> Any:
    text = loader.construct_scalar(node)
    if node.style is not None:  # it is quoted
        return text
    return None if text in NULLS else Plain(text, node.start_mark.line + 1)


_Loader.add_constructor("tag:yaml.org,2002:str", _plain)


def load(text: str, where: str) -> Any:
    """Parse a YAML document into dicts, lists, strings and Plain values; an empty one is None.

    Args:
        where: name of the document, for errors.

    Raises:
        InputError: the text is not YAML, sets a key twice, or is nested too deeply.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader  # noqa: S506
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except RecursionError:
        raise InputError(f"{where} is nested too deeply; give a file of settings") from None
    # Values with explicit tags raise all of these.
    except LookupError:
        raise InputError(f"{where} has a value that its tag, such as !!int, does not allow; remove the tag") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(f"{where} is not YAML: {' '.join(str(error).split())}; correct it") from None


def parse_number(text: Plain, kind: type) -> int | float | None:
    """Convert an unquoted value to int or float (`kind`); None if it is not one, or ambiguous like 010."""
    if kind is float and text.lower() in SPECIAL_FLOATS:
        return float(SPECIAL_FLOATS[text.lower()])
    if not (INTEGER if kind is int else FLOAT).fullmatch(text):
        return None
    try:
        return kind(text)
    except ValueError:  # 1__0, or more digits than Python converts
        return None


def parse_bool(text: Plain) -> bool | None:
    """Convert an unquoted value to True or False; None if it is neither."""
    return BOOLS.get(text.lower())


def got(value: Any) -> str:
    """Format a value for an error: short, and with its line number if known."""
    shown = repr(value) if isinstance(value, Plain) and len(value) <= 80 else _short.repr(value)
    line = getattr(value, "line", 0)
    return f"{shown} (line {line})" if line else shown
