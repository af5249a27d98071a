"""Convert the symbols of a stored transcript to text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from las_fast.errors import InputError

SPACE = re.compile(r"<(?:space|sp)>|\[space\]", re.IGNORECASE)
SPECIAL = re.compile(r"<[^<>]+>|\[(?:sos|eos|bos|pad|unk)\]", re.IGNORECASE)  # tokens for start, end, padding and so on
_NAMES = (
    "AA AE AH AO AW AX AXR AY B CH D DH DX EH EL EM EN ER EY F G HH HV IH IX IY JH K L M N NG NX OW OY P Q R S SH T TH "
    "UH UW UX V W Y Z ZH SIL SP SPN PAU EPI H# BCL DCL GCL KCL PCL TCL"
)
PHONEMES = frozenset(_NAMES.split())
PHONEMES_THAT_ARE_WORDS = frozenset(("AH", "AW", "AY", "EH", "EL", "EM", "EN", "ER", "OW", "OY", "SH", "SP", "UH"))
WORD_START = "\u2581"  # of SentencePiece


def symbols_to_text(symbols: Sequence[str]) -> str:
    """Join a transcript stored as letters, as words, or as one string.

    Letters are concatenated. Symbols are words if some have more than one letter and none is a space; words are joined
    with single spaces. <sos>, <eos> and the like are dropped.

    Raises:
        InputError: the symbols are phonemes. The message lacks the file name, which the caller puts in front.
    """
    symbols = [" " if s == "|" else SPECIAL.sub("", SPACE.sub(" ", s)) for s in symbols]
    symbols = [s for s in symbols if s]
    if are_phonemes(symbols if len(symbols) > 1 else "".join(symbols).split()):
        some = " ".join(s.strip() for s in symbols)[:30]
        raise InputError(f"contains phonemes ({some}), not letters; give the archive with spelled transcripts")
    if any(s.startswith(WORD_START) for s in symbols):
        return "".join(symbols).replace(WORD_START, " ").strip()
    if len(symbols) > 1 and " " not in symbols and any(_letters(s) > 1 for s in symbols):
        return " ".join("".join(f" {s} " for s in symbols).split())
    return "".join(symbols)


def are_phonemes(symbols: Sequence[str]) -> bool:
    """Return whether all symbols are English phonemes, with or without stress, and at least one is not also a word."""
    names = [name for s in symbols if (name := s.strip().strip("[]").upper())]
    if not all((name[:-1] if name[-1] in "012" else name) in PHONEMES for name in names):
        return False
    return any(len(name) > 1 for name in names) and not PHONEMES_THAT_ARE_WORDS.issuperset(names)


def _letters(symbol: str) -> int:
    """Return the number of letters in a symbol; combining accents do not count."""
    return sum(not unicodedata.combining(c) for c in symbol.strip())
