"""The command line: options of a command, and any field of the settings, such as --training.epochs 3.

Names of settings may be written with dashes or underscores. On a wrong argument, the command exits with status 2 and
prints one sentence after "error: " that names the nearest valid argument, if one is near.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import itertools
import os
import re
import sys
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from las_fast.config import Config
from las_fast.errors import InputError, show
from las_fast.plain_yaml import Plain, parse_bool, parse_number
from las_fast.tree import from_tree, to_tree

Settings = TypeVar("Settings")

# Names that other toolkits give to our options and settings.
SYNONYMS = {
    "lr": "--training.learning-rate", "warmup": "--training.warmup-steps", "num-epochs": "--training.epochs",
    "max-epochs": "--training.epochs", "batch-size": "--data.utterances-per-batch", "num-workers": "--data.workers",
    "valid": "--data.dev", "specaugment": "--augment.time-masks", "bf16": "--training.precision",
    "fp16": "--training.precision", "beam-size": "--beam", "beam-width": "--beam", "num-beams": "--beam",
    "model": "--checkpoint", "pretrained": "--init", "language-model": "--lm", "output": "--out", "output-dir": "--out",
    "save-dir": "--out", "gpu": "--device",
}  # fmt: skip
NEAR = 0.65  # difflib ratio from which a name is suggested for an unknown one
NEGATIVE = re.compile(r"-(inf|(\d+\.?\d*|\.\d+)(e[+-]?\d+)?)$", re.IGNORECASE)
TYPE_NAMES = {"int": "a whole number", "float": "a number", "bool": "True or False"}


class Parser(argparse.ArgumentParser):
    """argparse.ArgumentParser with one-sentence errors; `fields` are the names of settings that it also takes."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.fields: tuple[str, ...] = ()
        self.user_set: set[str] = set()  # settings on the command line, such as "training.epochs"
        self._negative_number_matcher = NEGATIVE  # of argparse, which takes -inf and -1e3 for options
        self._words: list[str] = []

    def parse_known_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        self._words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(self._words, namespace)

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        options, rest = self.parse_known_args(args, namespace)
        if rest:
            self.error(self.unknown_option(rest[0]))
        return options

    def error(self, message: str) -> NoReturn:
        """Print the error, with argparse's messages rewritten, and exit with status 2."""
        self.exit(2, f"error: {show(self._sentence(message))}\n")

    def unknown_option(self, word: str) -> str:
        """Return the error message for an argument that is not an option."""
        if not word.startswith("-"):
            return f"{word!r} is not an option or the value of one; see --help"
        name = word.partition("=")[0]
        near = nearest_option(name, self.option_names())
        return f"there is no option {name}; " + (f"the nearest is {near}" if near else "see --help")

    def option_names(self) -> list[str]:
        """Return the names of all options of the command, then those of the settings."""
        return [*self._option_string_actions, "--help", *(f"--{field}" for field in self.fields)]

    def _sentence(self, message: str) -> str:
        if file := next(filter(_is_dashed_file, itertools.takewhile(lambda word: word != "--", self._words)), ""):
            return f"{file} begins with -, so it is read as an option; write ./{file}"
        if match := re.match(r"the following arguments are required: (.*)", message):
            if wrong := self._misspelt():
                return self.unknown_option(wrong)
            return f"{match[1]} must be given; see --help"
        if match := re.match(r"argument (\S+?)(?:/\S+)?: (.*)", message, re.DOTALL):
            return self._value_sentence(match[1], match[2])
        return message

    def _value_sentence(self, option: str, problem: str) -> str:
        if match := re.match(r"invalid (\w+) value: (.*)", problem, re.DOTALL):
            return f"{option} must be {TYPE_NAMES.get(match[1], match[1])}; got {match[2]}"
        if match := re.match(r"invalid choice: '(.*)' \(choose from (.*)\)", problem, re.DOTALL):
            choices = [choice.strip("'") for choice in match[2].split(", ")]
            return wrong_choice(option, match[1], choices)
        if problem.startswith("expected"):
            return f"{option} needs a value ({problem.replace('argument', 'value')}); see --help"
        return f"{option}: {problem}"

    def _misspelt(self) -> str:
        """Return the first argument that looks like an option but is not one, or ""."""
        flags = (word.partition("=")[0] for word in self._words if _is_name(word))
        return next((flag for flag in flags if not self.knows(flag)), "")

    def knows(self, flag: str) -> bool:
        """Return whether an option or setting has that name; any index of a list matches."""
        field = re.sub(r"\.\d+\.", ".0.", flag[2:].replace("_", "-"))
        return flag in self._option_string_actions or field in self.fields


def wrong_choice(option: str, value: str, choices: Iterable[str]) -> str:
    """Return the error message for a value that is not one of the choices."""
    near = difflib.get_close_matches(value.lower(), [*choices], 1)
    advice = f"; the nearest is {near[0]}" if near else ""
    return f"{option} must be one of {', '.join(choices)}; got {value!r}{advice}"


def nearest_option(name: str, names: Iterable[str]) -> str:
    """Return the option meant by an unknown one: a field with the same last part, a synonym, the nearest, or ""."""
    names, dashed = [*names], name.replace("_", "-")
    synonym = SYNONYMS.get(dashed.lstrip("-").rpartition(".")[2])
    fields = [known for known in names if known.rpartition(".")[2] == dashed.lstrip("-").rpartition(".")[2]]
    if not fields and synonym in names:
        return synonym
    if fields:
        return fields[0]
    near = difflib.get_close_matches(dashed.lstrip("-"), [known.lstrip("-") for known in names], 1, cutoff=NEAR)
    return next((known for known in names if near and known.lstrip("-") == near[0]), "")


def parse_settings(
    parser: Parser,
    argv: list[str] | None,
    defaults: Callable[[argparse.Namespace], Settings],
    *,
    kind: type = Config,
    shown: Callable[[argparse.Namespace], Settings] | None = None,
) -> tuple[argparse.Namespace, Settings]:
    """Parse the options of the parser, then any field of the settings, such as --training.epochs 3.

    Afterwards parser.user_set has the names of the settings among the arguments.

    Args:
        parser:   created with add_help=False; without positional arguments.
        argv:     arguments after the command; by default those of the process.
        defaults: returns, for the parsed options, the settings that the remaining arguments override.
        kind:     dataclass whose fields --help lists.
        shown:    returns, for the options beside --help, the settings whose values --help shows; by default kind().

    Returns:
        The parsed options, and the settings.

    Exits after printing --help. If an argument is wrong, exits with status 2 and an error; for an unknown one, it names
    the nearest option or field.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser.allow_abbrev = False  # an abbreviation could be the start of a field name
    parser.fields = tuple(field_names(to_tree(kind())))
    if {"-h", "--help"} & set(argv):
        _print_help(parser, kind() if shown is None else shown(_options_beside_help(parser, argv)))
    options, rest = parser.parse_known_args(argv)
    check_names(parser, rest)  # before `defaults` loads a model
    return options, override(parser, defaults(options), rest)


def _options_beside_help(parser: Parser, argv: list[str]) -> argparse.Namespace:
    """Parse the options beside --help; required ones may be missing and are None then."""
    required = [action for action in parser._actions if action.required]
    for action in required:
        action.required = False
    options, _ = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    for action in required:
        action.required = True
    return options


def _print_help(parser: Parser, values: Any) -> None:
    import tyro

    parser.print_help()
    print("\nand any of these settings:\n")
    options: dict[str, Any] = {"prog": parser.prog, "config": (tyro.conf.FlagConversionOff,)}
    tyro.cli(type(values), default=values, args=["--help"], **options)


def field_names(tree: Any, name: str = "") -> Iterator[str]:
    """Yield the names of all settings in option form, such as training.teacher-forcing.0.end."""
    if isinstance(tree, list) and tree and isinstance(tree[0], dict):
        tree = {str(i): item for i, item in enumerate(tree)}
    if not isinstance(tree, dict):
        yield name.replace("_", "-")
        return
    for key, inner in tree.items():
        yield from field_names(inner, f"{name}.{key}".lstrip("."))


def check_names(parser: Parser, words: list[str]) -> None:
    """Exit with status 2 at the first argument that is neither a setting nor a value of one."""
    if words and not _is_name(words[0]):
        parser.error(parser.unknown_option(words[0]))
    for word in filter(_is_name, words):
        if not parser.knows(word.partition("=")[0]):
            parser.error(parser.unknown_option(word))


def override(parser: Parser, start: Settings, words: list[str]) -> Settings:
    """Return `start` with the fields that the arguments `words` set; exit with status 2 on an invalid value."""
    tree = to_tree(start)
    names = set(field_names(tree))
    words = [*words]
    while words:
        name, equals, value = words.pop(0).partition("=")
        values = [value] if equals else []
        while words and not _is_name(words[0]):
            values.append(words.pop(0))
        field = name[2:].replace("_", "-")
        if field not in names:
            parser.error(f"{name} does not exist: {_missing_item(field, tree)}")
        try:
            _set(type(start), tree, field.replace("-", "_").split("."), values, f"--{field}")
            parser.user_set.add(field.replace("-", "_"))
        except InputError as error:
            parser.error(str(error))
    return from_tree(type(start), tree, "settings")


def _is_name(word: str) -> bool:
    return word.startswith("--") and word != "--"


def _is_dashed_file(word: str) -> bool:
    """Return whether an argument that begins with a dash is the name of a file."""
    from las_fast.files import KNOWN_SUFFIXES

    if not word.startswith("-") or word == "-":
        return False
    return os.path.isfile(word) or (word[1] != "-" and Path(word).suffix.lower() in KNOWN_SUFFIXES)


def _missing_item(field: str, tree: Any) -> str:
    name = re.split(r"\.\d+\.", field)[0]
    for part in name.replace("-", "_").split("."):
        tree = tree[part]
    return f"{name} has {len(tree)} items, numbered from 0"


def _set(kind: Any, tree: Any, path: list[str], values: list[str], option: str) -> None:
    """Set the field at `path` in `tree`, a dataclass of type `kind` as plain data, to the arguments `values`."""
    first: Any = path[0]
    rest = path[1:]
    if dataclasses.is_dataclass(kind):
        inner = typing.get_type_hints(kind)[first]
    else:  # a tuple of dataclasses
        first, inner = int(first), typing.get_args(kind)[0]
    if rest:
        _set(inner, tree[first], rest, values, option)
    elif typing.get_origin(inner) is tuple:
        tree[first] = [_value(typing.get_args(inner)[0], value, option) for value in values]
    elif len(values) != 1:
        got = f"got {len(values)}: {' '.join(values)}" if values else "got none"
        raise InputError(f"{option} needs one value; {got}")
    else:
        tree[first] = _value(inner, values[0], option)


def _value(kind: Any, word: str, option: str) -> Any:
    """Convert an argument to `kind` by the rules for settings files."""
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if word not in choices:
            raise InputError(wrong_choice(option, word, choices))
        return word
    if kind is str:
        return word
    value = parse_bool(Plain(word)) if kind is bool else parse_number(Plain(word), kind)
    if value is None:
        raise InputError(f"{option} must be {TYPE_NAMES[kind.__name__]}; got {word!r}")
    return value
