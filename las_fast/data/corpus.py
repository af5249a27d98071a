"""The common form of all data layouts: a Corpus of named splits, each a list of Utterances in submission order."""

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

ROLES = {  # role -> names of splits that have it, preferred first; a split's name may continue after a hyphen
    "train": ("train", "training"),
    "dev": ("dev", "dev-clean", "valid", "validation", "val", "development", "devel", "eval", "evaluation"),
    "test": ("test", "test-clean", "testing"),
}
HOURS = {"460": ("100", "360"), "960": ("100", "360", "500")}  # usual unions of LibriSpeech training folders, in hours


@dataclass(frozen=True)
class Utterance:
    id: str
    path: Path  # features (.npy) or audio; loading reports a missing file
    transcript: str | Path | None  # the text, the .npy that holds it, or None
    seconds: float | None = None  # expected duration of a recording, or exact duration of a part
    start: float = 0.0  # seconds into the recording
    is_part: bool = False  # read only `seconds` from `start` on, or up to the end if seconds is None
    problem: str = ""  # why it is unusable, if known before reading the file

    @property
    def span(self) -> tuple[float, float]:
        """Start and end in seconds of the part to read; the end is infinite if that is the end of the recording."""
        return self.start, self.start + self.seconds if self.is_part and self.seconds else math.inf


@dataclass(frozen=True)
class Corpus:
    """A recognised data root."""

    name: str  # of the layout
    root: Path
    kind: Literal["features", "audio"]
    listings: Mapping[str, Callable[[], list[Utterance]]] = field(repr=False)  # split -> function that lists it
    roles: Mapping[str, tuple[str, ...]]  # train, dev, test -> splits
    named_split: str = ""  # split that the user's path names, dev-clean for LibriSpeech/dev-clean; "": none
    feature_size: int | None = None  # F of feature files; None for audio
    feature_kind: Literal["logmel", "mfcc"] | None = None  # of feature files; None for audio
    transposed: bool = False  # feature files have shape (F, T) instead of (T, F)
    header: tuple[str, str] = ("id", "label")  # of the submission file
    numbered: bool = False  # the submission's first column counts rows from 0 instead of naming the utterance
    expected_texts: str = "one text per recording"  # for errors: where the transcripts should be
    split_remedy: str = "name one of its folders after it"  # for errors: how to add a missing split
    split_options: str = "--split, in training --data.train and --data.dev"  # for errors

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.listings)

    def utterances(self, split: str) -> list[Utterance]:
        """List the utterances of a split in submission order; InputError if there is no such split."""
        if split not in self.listings:
            raise InputError(self._missing(split))
        return self.listings[split]()

    def resolve(self, split: str) -> tuple[str, ...]:
        """Expand `split` into names of splits.

        `split` is a split name, a role (train, dev, test), the hours of LibriSpeech training folders ("460" is
        train-clean-100 with train-clean-360), or several of these joined by "+" or ",". Raises InputError, which
        lists the splits, for an unknown name.
        """
        if split in self.listings:
            return (split,)
        names: list[str] = []
        for part in re.split(r"[+,]", split):
            for name in self._resolve_one(part.strip()):
                if name not in names:
                    names.append(name)
        return tuple(names)

    def choose(self, split: str | None, default: str = "dev") -> tuple[str, ...]:
        """Return the names of the splits that a command reads.

        A path that names a split means that split alone where `split` is None or a role: LibriSpeech/train-clean-100
        with train is not all training splits.

        Args:
            split:   as for resolve; None: the split that the path names, or else `default`.
            default: as for resolve.

        Raises:
            InputError: there is no such split, or the path names another one.
        """
        names = self.resolve(split or (self.named_split or default))
        if not self.named_split:
            return names
        if self.named_split not in names:
            path = self.root / self.named_split
            raise InputError(
                f"{path} is the split {self.named_split}, but {split!r} is asked for; give {self.root}, or the split "
                f"{self.named_split}"
            )
        return (self.named_split,) if split is None or is_role(split) else names

    def _resolve_one(self, part: str) -> tuple[str, ...]:
        if part in self.listings:
            return (part,)
        if named := [name for name in self.listings if name.casefold() == part.casefold()]:
            return tuple(named[:1])
        role = next((role for role, names in ROLES.items() if part.casefold() in names), part)
        if role in self.roles:
            return self.roles[role]
        return self._resolve_hours(part)

    def _resolve_hours(self, part: str) -> tuple[str, ...]:
        hours = part.removeprefix("train-").removeprefix("clean-")
        named = {re.sub(r"^train-(clean|other)-", "", name): name for name in self.listings}
        wanted = HOURS.get(hours, (hours,))
        if not part or any(h not in named for h in wanted):
            raise InputError(self._missing(part))
        return tuple(named[h] for h in wanted)

    def _missing(self, part: str) -> str:
        roles = [f"{role} ({', '.join(names)})" for role, names in self.roles.items() if names != (role,)]
        available = ", ".join([*self.listings, *roles])
        remedy = f"give one of these ({self.split_options})"
        if part in ROLES:
            remedy += f", or {self.split_remedy}"
        near = difflib.get_close_matches(part, [*self.listings, *self.roles], 1)
        nearest = f" (the nearest is {near[0]})" if near else ""
        return f"{self.root} has no split {part!r}; it has {available}{nearest}; {remedy}"


@lru_cache(maxsize=1024)
def role_of(split: str) -> str | None:
    """Return the role (train, dev, test) that a split's name indicates, or None."""
    plain = _plain(split)
    first, *others = (_role_named(word) for word in re.split(r"[-\d]", plain))
    if plain.startswith("train"):  # but ESPnet's train-dev is a dev set
        return others[0] if len(others) == 1 and others[0] else "train"
    return first


def _role_named(word: str) -> str | None:
    return next((role for role, names in ROLES.items() if word in names), None)


def is_role(split: str) -> bool:
    """Return whether a split's name is exactly a name of a role."""
    return any(_plain(split) in names for names in ROLES.values())


def assign_roles(splits: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Map the roles train, dev and test to splits, by name; a role without a split is left out."""
    plain = {split: _plain(split) for split in splits}
    roles: dict[str, tuple[str, ...]] = {}
    for role, names in ROLES.items():
        exact = next((split for name in names for split, plain_name in plain.items() if plain_name == name), None)
        others = tuple(split for split, plain_name in plain.items() if role_of(plain_name) == role)
        if exact is not None:
            roles[role] = (exact,)
        elif others and (role == "train" or len(others) == 1):
            roles[role] = others
    return roles


def _plain(split: str) -> str:
    return split.strip().casefold().replace("_", "-")
