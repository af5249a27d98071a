"""What every kind of data looks like to the rest of the package: named splits of utterances, in submission order."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from las_fast.errors import InputError

UNIONS = {"460": ("100", "360"), "960": ("100", "360", "500")}  # hours of LibriSpeech training folders that go together


@dataclass(frozen=True)
class Utterance:
    id: str
    path: Path  # features (.npy) or audio; it may be missing, which loading reports
    transcript: str | Path | None  # the text, the .npy that holds it, or None where there is none
    seconds: float | None = None  # how long the recording should be, where the data say so


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
        if part in self.roles:
            return self.roles[part]
        hours = part.removeprefix("train-").removeprefix("clean-")
        train = [name for name in self.listings if name.startswith("train-")]
        named = {re.sub(r"^train-(clean|other)-", "", name): name for name in train}
        wanted = UNIONS.get(hours, (hours,))
        if not part or any(h not in named for h in wanted):
            raise InputError(self._missing(part))
        return tuple(named[h] for h in wanted)

    def _missing(self, part: str) -> str:
        roles = [f"{role} ({', '.join(names)})" for role, names in self.roles.items() if names != (role,)]
        return f"{self.root} has no split {part!r}; it has {', '.join([*self.listings, *roles])}"


def assign_roles(splits: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return which splits are train, dev and test, by their names; a role that no split plays is left out."""
    splits = tuple(splits)

    def role(*names: str, prefix: str = "") -> tuple[str, ...]:
        exact = tuple(name for name in names if name in splits)[:1]
        return exact or tuple(name for name in splits if prefix and name.startswith(prefix))

    roles = {
        "train": role("train", prefix="train"),
        "dev": role("dev", "dev-clean", "valid", "validation"),
        "test": role("test", "test-clean"),
    }
    return {name: found for name, found in roles.items() if found}


def subfolders(path: Path) -> list[Path]:
    """Return the folders in a folder, sorted; hidden ones, and those that a Mac adds to a zip, are left out."""
    try:
        return sorted(p for p in path.iterdir() if not p.name.startswith((".", "__MACOSX")) and p.is_dir())
    except OSError as error:
        raise InputError(f"{path} cannot be listed: {error.strerror}; check the path and its permissions") from None
