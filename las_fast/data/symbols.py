"""From the symbols of a stored transcript to its text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from las_fast.errors import InputError

SPACE = re.compile(r"<(?:space|sp)>|\[space\]", re.IGNORECASE)
MARK = re.compile(r"<[^<>]+>|\[(?:sos|eos|bos|pad|unk)\]", re.IGNORECASE)  # of a start, an end, padding, ...
_NAMES = (
    "AA AE AH AO AW AX AXR AY B CH D DH DX EH EL EM EN ER EY F G HH HV IH IX IY JH K L M N NG NX OW OY P Q R S SH T TH "
    "UH UW UX V W Y Z ZH SIL SP SPN PAU EPI H# BCL DCL GCL KCL PCL TCL"
)
PHONEMES = frozenset(_NAMES.split())
WORDS = frozenset(("AH", "AW", "AY", "EH", "EL", "EM", "EN", "ER", "OW", "OY", "SH", "SP", "UH"))  # which text may hold
PIECE = "\u2581"  # begins a word in SentencePiece


def join_symbols(symbols: Sequence[str]) -> str:
    """Return the text of a transcript stored as letters, as words, or as one string.

    Letters are joined as they are. Words, which is what symbols of more than one letter are where none is a space, are
    joined with single spaces. <sos>, <eos> and the like are left out.

    Raises:
        InputError: the symbols are phonemes; the sentence lacks its subject, the file.
    """
    symbols = [" " if s == "|" else MARK.sub("", SPACE.sub(" ", s)) for s in symbols]
    symbols = [s for s in symbols if s]
    if are_phonemes(symbols if len(symbols) > 1 else "".join(symbols).split()):
        some = " ".join(s.strip() for s in symbols)[:30]
        raise InputError(f"holds phonemes ({some}), not letters; give the archive whose transcripts are spelled")
    if any(s.startswith(PIECE) for s in symbols):
        return "".join(symbols).replace(PIECE, " ").strip()
    if len(symbols) > 1 and " " not in symbols and any(_letters(s) > 1 for s in symbols):
        return " ".join("".join(f" {s} " for s in symbols).split())
    return "".join(symbols)


def are_phonemes(symbols: Sequence[str]) -> bool:
    """Say whether symbols are all phonemes of English, with or without stress, and not words as well."""
    names = [name for s in symbols if (name := s.strip().strip("[]").upper())]
    if not all((name[:-1] if name[-1] in "012" else name) in PHONEMES for name in names):
        return False
    return any(len(name) > 1 for name in names) and not WORDS.issuperset(names)


def _letters(symbol: str) -> int:
    """Return how many letters a symbol has; an accent of its own is none."""
    return sum(not unicodedata.combining(c) for c in symbol.strip())
