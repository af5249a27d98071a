"""Dataclasses to and from plain data: dicts, lists and scalars, as in YAML. Types are checked strictly."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from las_fast import plain_yaml
from las_fast.errors import InputError
from las_fast.plain_yaml import got


def to_tree(config: Any) -> Any:
    """Convert a dataclass to plain dicts, lists and scalars, ready for YAML."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_tree(getattr(config, f.name)) for f in dataclasses.fields(config)}
    return [to_tree(item) for item in config] if isinstance(config, tuple) else config


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of each setting in plain data; None, as of an empty section, is left out."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value


def from_tree(kind: Any, tree: Any, where: str) -> Any:
    """Build a value of type `kind` from plain data.

    Args:
        kind:  a dataclass, tuple, Literal or scalar type.
        tree:  plain data as to_tree returns it, or Plain texts (unquoted scalars of a file).
        where: name of the data in errors.

    Raises:
        InputError: a key is unknown, or a value has the wrong type.
    """
    if dataclasses.is_dataclass(kind):
        return _dataclass_from_tree(kind, tree, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if tree not in arguments:
            raise InputError(f"{where} must be one of {', '.join(map(repr, arguments))}; got {got(tree)}")
        return str(tree)
    if origin is tuple:
        if not isinstance(tree, list):
            raise InputError(f"{where} must be a list; got {got(tree)}")
        return tuple(from_tree(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(tree))
    value = _from_plain(kind, tree) if isinstance(tree, plain_yaml.Plain) else tree
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise InputError(f"{where} must be {kind.__name__}; got {got(tree)}{_hint(kind, tree)}")
    return value


def _from_plain(kind: type, text: plain_yaml.Plain) -> Any:
    """Convert an unquoted text to `kind`; return the text itself if that is not possible."""
    value: Any = text
    if kind is str:
        value = str(text)
    elif kind is bool:
        value = plain_yaml.parse_bool(text)
    elif kind in (int, float):
        value = plain_yaml.parse_number(text, kind)
    return text if value is None else value


def _hint(kind: type, tree: Any) -> str:
    if kind not in (int, float) or not isinstance(tree, plain_yaml.Plain):
        return ""
    if tree.lstrip("+-").startswith("0"):
        return "; write it in decimal, without a leading zero"
    return "; write minutes and hours as one number" if ":" in tree else ""


def _dataclass_from_tree(kind: Any, tree: Any, where: str) -> Any:
    if tree is None:  # every line of the section is commented out
        tree = {}
    if not isinstance(tree, dict):
        raise InputError(f"{where} must be a mapping of settings; got {got(tree)}")
    hints = typing.get_type_hints(kind)
    for key in tree:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, 1, cutoff=0.7)
            advice = f"the nearest is {near[0]!r}" if near else f"it has {', '.join(hints)}"
            raise InputError(f"{where} has no setting {got(str(key))}; {advice}")
    missing = [f.name for f in dataclasses.fields(kind) if f.name not in tree and _required(f)]
    if missing:
        raise InputError(f"{where} lacks {', '.join(missing)}; add a value for each")
    return kind(**{key: from_tree(hints[key], value, f"{where}: {key}") for key, value in tree.items()})


def _required(f: dataclasses.Field) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
