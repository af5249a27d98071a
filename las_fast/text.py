"""Characters and token ids."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from las_fast.errors import InputError

PAD, SOS, EOS = 0, 1, 2
SPECIAL = ("<pad>", "<sos>", "<eos>")
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ' "


@dataclass(frozen=True)
class Vocabulary:
    """Token ids 0, 1 and 2 are <pad>, <sos> and <eos>; the characters follow in their order.

    The default is the order of the HW4P2 editions from S23 on (31 tokens). <pad> also serves as the CTC blank.
    """

    characters: str = CHARACTERS

    def __post_init__(self):
        if len(set(self.characters)) != len(self.characters) or not self.characters:
            raise InputError(f"a vocabulary needs distinct characters, got {self.characters!r}")

    def __len__(self) -> int:
        return len(SPECIAL) + len(self.characters)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {character: i for i, character in enumerate(self.characters, len(SPECIAL))}

    def unknown(self, text: str) -> list[str]:
        """Return the distinct characters of text that have no token, sorted."""
        return sorted(set(text) - self._ids.keys())

    def encode(self, text: str) -> list[int]:
        """Return the ids of text's characters, without <sos> or <eos>; raise InputError on an unknown character."""
        if unknown := self.unknown(text):
            raise InputError(
                f"transcript {text[:40]!r} has characters outside the vocabulary: {' '.join(map(repr, unknown))}; "
                "use --data.normalise-text True to map them, or give --data.characters"
            )
        return [self._ids[character] for character in text]

    def decode(self, ids) -> str:
        """Return the text of ids up to the first <eos>; <pad> and <sos> are left out."""
        characters = []
        for token in map(int, ids):
            if token == EOS:
                break
            if token >= len(SPECIAL):
                characters.append(self.characters[token - len(SPECIAL)])
        return "".join(characters)


def normalise_text(text: str, characters: str = CHARACTERS) -> str:
    """Map text onto characters: the vocabulary's case, accents removed, typographic apostrophes made plain,
    everything else turned into a space; runs of spaces become one."""
    text = unicodedata.normalize("NFKD", text.replace("\u2019", "'").replace("\u2018", "'"))
    if characters == characters.upper():
        text = text.upper()
    elif characters == characters.lower():
        text = text.lower()
    kept = (c if c in characters else "" if unicodedata.combining(c) else " " for c in text)
    return " ".join("".join(kept).split())


def read_characters(path: str | Path) -> str:
    """Return the characters of a char_set.txt (one symbol a line; symbols such as <unk> are left out)."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    return "".join(line for line in lines if len(line) == 1)
