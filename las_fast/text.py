"""Characters and token ids."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import cached_property

from las_fast.errors import InputError

PAD, SOS, EOS = 0, 1, 2
SPECIAL = ("<pad>", "<sos>", "<eos>")
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ' "
DIGITS = "0123456789"
PLAIN = {  # what Unicode does not take apart
    "\u2019": "'", "\u2018": "'", "\u02bc": "'", "\u00df": "ss", "\u1e9e": "SS", "\u0131": "i",
    "\u00c6": "AE", "\u00e6": "ae", "\u0152": "OE", "\u0153": "oe", "\u00d8": "O", "\u00f8": "o",
    "\u0141": "L", "\u0142": "l", "\u0110": "D", "\u0111": "d", "\u00d0": "D", "\u00f0": "d",
    "\u00de": "TH", "\u00fe": "th",
}  # fmt: skip


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
    """Map text onto characters: the vocabulary's case, accents removed, ligatures written out, typographic apostrophes
    made plain, everything else turned into a space; runs of spaces become one. Digits are lost: see lost_digits."""
    text = _to_case(unicodedata.normalize("NFC", text), characters)
    return " ".join("".join(c if c in characters else _map(c, characters) for c in text).split())


def lost_digits(text: str, characters: str = CHARACTERS) -> bool:
    """Say whether text holds digits, or signs made of them such as a half, that are not among characters."""
    return any(c.isdecimal() and c not in characters for c in unicodedata.normalize("NFKD", text))


def _to_case(text: str, characters: str) -> str:
    if characters == characters.upper():
        return text.upper()
    return text.lower() if characters == characters.lower() else text


def _map(character: str, characters: str) -> str:
    """Return what characters have for one that they lack."""
    parts = unicodedata.normalize("NFKD", PLAIN.get(character, character))
    parts = "".join(PLAIN.get(c, c) for c in parts)  # an accent may have hidden one: an o with a stroke and an acute
    kept = (c if c in characters else "" if unicodedata.combining(c) else " " for c in _to_case(parts, characters))
    return "".join(kept)


BLANK = 0
