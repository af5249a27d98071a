"""The vocabulary (characters and their token ids), and the mapping of text onto its characters."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import cached_property

from las_fast.errors import InputError

PAD, SOS, EOS = 0, 1, 2
BLANK = PAD  # of CTC
SPECIAL = ("<pad>", "<sos>", "<eos>")
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ' "
DIGITS = "0123456789"
TRANSLITERATIONS = {  # characters without a Unicode decomposition
    "\u2019": "'", "\u2018": "'", "\u02bc": "'", "\u00df": "ss", "\u1e9e": "SS", "\u0131": "i",
    "\u00c6": "AE", "\u00e6": "ae", "\u0152": "OE", "\u0153": "oe", "\u00d8": "O", "\u00f8": "o",
    "\u0141": "L", "\u0142": "l", "\u0110": "D", "\u0111": "d", "\u00d0": "D", "\u00f0": "d",
    "\u00de": "TH", "\u00fe": "th",
}  # fmt: skip


@dataclass(frozen=True)
class Vocabulary:
    """Token ids 0, 1 and 2 are <pad>, <sos> and <eos>, then the characters in order.

    The default is that of the HW4P2 editions since S23 (31 tokens). <pad> is also the CTC blank.

    Raises:
        InputError: the characters are empty or not distinct.
    """

    characters: str = CHARACTERS

    def __post_init__(self):
        if len(set(self.characters)) != len(self.characters) or not self.characters:
            raise InputError(f"a vocabulary needs one or more characters, each given once; got {self.characters!r}")

    def __len__(self) -> int:
        return len(SPECIAL) + len(self.characters)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {character: i for i, character in enumerate(self.characters, len(SPECIAL))}

    def unknown(self, text: str) -> list[str]:
        """Return the distinct characters of text that are not in the vocabulary, sorted."""
        return sorted(set(text) - self._ids.keys())

    def encode(self, text: str) -> list[int]:
        """Convert text to token ids, without <sos> or <eos>; raise InputError on an unknown character."""
        if unknown := self.unknown(text):
            raise InputError(
                f"transcript {text[:40]!r} has characters outside the vocabulary: {' '.join(map(repr, unknown))}; "
                f"{training_remedy(unknown)}"
            )
        return [self._ids[character] for character in text]

    def decode(self, ids) -> str:
        """Convert token ids up to the first <eos> to text, leaving out <pad> and <sos>."""
        characters = []
        for token in map(int, ids):
            if token == EOS:
                break
            if token >= len(SPECIAL):
                characters.append(self.characters[token - len(SPECIAL)])
        return "".join(characters)


def normalise_text(text: str, characters: str = CHARACTERS) -> str:
    """Map text onto a vocabulary's characters.

    Letters take the vocabulary's case, accents are removed, ligatures are written out, and typographic apostrophes
    become plain. Everything else becomes a space, digits included (see has_lost_digits). Runs of spaces become one, or
    none if the vocabulary has no space.
    """
    text = to_case(unicodedata.normalize("NFC", text), characters)
    space = " " if " " in characters else ""
    return space.join("".join(c if c in characters else _map(c, characters) for c in text).split())


def has_lost_digits(text: str, characters: str = CHARACTERS) -> bool:
    """Return whether text has digits, or characters made of digits such as ½, that `characters` lacks."""
    return any(c.isdecimal() and c not in characters for c in unicodedata.normalize("NFKD", text))


def remedy(unknown: list[str], option: str) -> str:
    """Return what to do about characters outside a vocabulary: `option` maps all of them except digits."""
    digits = [c for c in unknown if has_lost_digits(c, "")]
    if not digits:
        return f"map them with {option}"
    return "write digits as words" + (f" and map the others with {option}" if len(digits) < len(unknown) else "")


def training_remedy(unknown: list[str]) -> str:
    """Return what to do in training about characters outside the vocabulary."""
    return f"{remedy(unknown, '--data.normalise-text True')}, or give --data.characters"


def to_case(text: str, characters: str) -> str:
    """Convert letters to the case of a vocabulary's characters, unless it has both.

    Letters without a capital of their own, such as ß, which becomes SS, and º do not make a vocabulary one of both
    cases.
    """
    small = {c for c in characters if c.islower()}
    if all(len(c.upper()) > 1 or c.upper() == c for c in small):
        return "".join(c if c in small else c.upper() for c in text) if small else text.upper()
    return text.lower() if characters == characters.lower() else text


def _map(character: str, characters: str) -> str:
    """Return the replacement for a character that the vocabulary lacks."""
    parts = unicodedata.normalize("NFKD", TRANSLITERATIONS.get(character, character))
    parts = "".join(
        TRANSLITERATIONS.get(c, c) for c in parts
    )  # without its accent a character may be in the table, as U+01FF
    kept = (c if c in characters else "" if unicodedata.combining(c) else " " for c in to_case(parts, characters))
    return "".join(kept)
