"""What every kind of data looks like to the rest of the package: named splits of utterances, in submission order."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

from las_fast.errors import InputError

ROLES = {  # what splits that play a role are called, the first choice first; more may follow after a hyphen
    "train": ("train", "training"),
    "dev": ("dev", "dev-clean", "valid", "validation", "val", "development", "devel", "eval", "evaluation"),
    "test": ("test", "test-clean", "testing"),
}
UNIONS = {"460": ("100", "360"), "960": ("100", "360", "500")}  # hours of LibriSpeech training folders that go together


@dataclass(frozen=True)
class Utterance:
    id: str
    path: Path  # features (.npy) or audio; it may be missing, which loading reports
    transcript: str | Path | None  # the text, the .npy that holds it, or None where there is none
    seconds: float | None = None  # how long the recording should be, or the part is, where the data say so
    start: float = 0.0  # seconds into the recording
    is_part: bool = False  # only `seconds` from `start` are meant, or all from there without them
    problem: str = ""  # why it cannot be used, where that is known before the file is read

    @property
    def span(self) -> tuple[float, float]:
        """Start and end of what is read, in seconds; the end is infinite where nothing ends it before the recording."""
        return self.start, self.start + self.seconds if self.is_part and self.seconds else math.inf


@dataclass(frozen=True)
class Corpus:
    """A recognised data root.

    `name` says what it was recognised as, `header` and `numbered` what its submission file looks like (numbered: the
    first column counts rows from 0, otherwise it holds the utterance id), `roles` which splits train, dev and test are.
    """

    name: str
    root: Path
    kind: Literal["features", "audio"]
    listings: Mapping[str, Callable[[], list[Utterance]]] = field(repr=False)  # split name -> reads its utterances
    roles: Mapping[str, tuple[str, ...]]
    feature_size: int | None = None
    transposed: bool = False  # files hold (F, T)
    header: tuple[str, str] = ("id", "label")
    numbered: bool = False
    texts: str = "a text for each recording"  # where transcripts are looked for
    naming: str = "name one of its folders so"  # what gives the data a split that they lack

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.listings)

    def utterances(self, split: str) -> list[Utterance]:
        """Return the utterances of a split in submission order; InputError if there is no such split."""
        if split not in self.listings:
            raise InputError(self._missing(split))
        return self.listings[split]()

    def resolve(self, split: str) -> tuple[str, ...]:
        """Return the split names that `split` means.

        `split` is a split name, a role (train, dev, test), the hours of LibriSpeech training folders ("460" is
        both train-clean-100 and train-clean-360), or several of these joined by "+" or ",". Raises InputError with
        what there is otherwise.
        """
        if split in self.listings:
            return (split,)
        names: list[str] = []
        for part in re.split(r"[+,]", split):
            for name in self._resolve_one(part.strip()):
                if name not in names:
                    names.append(name)
        return tuple(names)

    def _resolve_one(self, part: str) -> tuple[str, ...]:
        if part in self.listings:
            return (part,)
        if named := [name for name in self.listings if name.casefold() == part.casefold()]:
            return tuple(named[:1])
        role = next((role for role, names in ROLES.items() if part.casefold() in names), part)
        if role in self.roles:
            return self.roles[role]
        return self._of_hours(part)

    def _of_hours(self, part: str) -> tuple[str, ...]:
        hours = part.removeprefix("train-").removeprefix("clean-")
        named = {re.sub(r"^train-(clean|other)-", "", name): name for name in self.listings}
        wanted = UNIONS.get(hours, (hours,))
        if not part or any(h not in named for h in wanted):
            raise InputError(self._missing(part))
        return tuple(named[h] for h in wanted)

    def _missing(self, part: str) -> str:
        roles = [f"{role} ({', '.join(names)})" for role, names in self.roles.items() if names != (role,)]
        there = ", ".join([*self.listings, *roles])
        remedy = "give one of these (--split, in training --data.train and --data.dev)"
        if part in ROLES:
            remedy += f", or {self.naming}"
        near = difflib.get_close_matches(part, [*self.listings, *self.roles], 1)
        nearest = f" (the nearest is {near[0]})" if near else ""
        return f"{self.root} has no split {part!r}; it has {there}{nearest}; {remedy}"


@lru_cache(maxsize=1024)
def role_of(split: str) -> str | None:
    """Return which role (train, dev, test) a split's name speaks of, or None."""
    plain = _plain(split)
    if plain.startswith("train"):
        return "train"
    first = re.split(r"[-\d]", plain, maxsplit=1)[0]
    return next((role for role, names in ROLES.items() if first in names), None)


def is_role(split: str) -> bool:
    """Say whether a split's name is nothing but that of a role."""
    return any(_plain(split) in names for names in ROLES.values())


def assign_roles(splits: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return which splits are train, dev and test, by their names; a role that no split plays is left out."""
    plain = {split: _plain(split) for split in splits}
    roles: dict[str, tuple[str, ...]] = {}
    for role, names in ROLES.items():
        exact = next((split for name in names for split, own in plain.items() if own == name), None)
        others = tuple(split for split, own in plain.items() if role_of(own) == role)
        if exact is not None:
            roles[role] = (exact,)
        elif others and (role == "train" or len(others) == 1):
            roles[role] = others
    return roles


def _plain(split: str) -> str:
    return split.strip().casefold().replace("_", "-")
