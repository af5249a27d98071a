"""Read text for language models and speech synthesis, one sentence at a time.

Texts are plain files with one sentence per line (.gz too), LibriSpeech's *.trans.txt, Kaldi's text, anything that
--data of the other commands takes (the transcripts of a split), or folders of transcripts as .npy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from las_fast.data import folders, hw4p2, kaldi, librispeech, plain_text, tables
from las_fast.data.layouts import open_corpus
from las_fast.data.overlap import Excluded
from las_fast.errors import InputError
from las_fast.text import has_lost_digits, normalise_text


def read_texts(
    source: Path, split: str | None = None, *, default: str = "train", option: str = "--split"
) -> Iterator[str]:
    """Yield the unmodified sentences of a file or folder; see above for the formats.

    split:   of an archive, a LibriSpeech folder or a manifest; None: the one that the path names, or else `default`.
    default: a role, as for Corpus.choose.
    option:  that names the split, for errors.
    """
    if source.is_dir() and (arrays := folders.list_files(source, {".npy"})):
        yield from map(hw4p2.read_transcript, arrays)
    elif kaldi.is_text(source):
        yield from (text for _, _, text in kaldi.read_table(source))
    elif source.is_dir() or source.suffix.lower() in tables.SUFFIXES:
        yield from _read_corpus(source, split, default, option)
    elif source.name.lower().endswith(".trans.txt"):
        yield from (text for _, text in librispeech.read_transcripts(source))
    else:
        plain_text.check_signature(source)
        yield from plain_text.sentences(source, folders.read_lines(source))


def _read_corpus(root: Path, split: str | None, default: str, option: str) -> Iterator[str]:
    corpus = replace(open_corpus(root), split_options=option)
    for name in corpus.choose(split, default):
        for utterance in corpus.utterances(name):
            text = utterance.transcript
            if text is not None:
                yield hw4p2.read_transcript(text) if isinstance(text, Path) else text


def map_text(text: str, characters: str) -> str | None:
    """Return a sentence in these characters; None if it has digits, whose spoken form is unknown."""
    text = text.strip()
    if has_lost_digits(text, characters):
        return None
    return text if set(characters).issuperset(text) else normalise_text(text, characters)


def read_excluded(sources: list[Path], split: str | None, characters: str) -> Excluded | None:
    """Read the texts of --exclude; None if there are none.

    split: of each corpus; None: the one that its path names, or the dev split.

    Raises:
        InputError: a source has no sentence.
    """
    texts = []
    for source in sources:
        sentences = list(read_texts(source, split, default="dev", option="--exclude-split"))
        if not any(normalise_text(text, characters) for text in sentences):
            raise InputError(f"there is no sentence in {source}; give --exclude texts with one sentence per line")
        texts += sentences
    return Excluded(texts, characters) if texts else None
