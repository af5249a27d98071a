"""Characters and token ids."""

import pytest

from las_fast.errors import InputError
from las_fast.text import EOS, PAD, SOS, Vocabulary, normalise_text, read_characters


def test_default_vocabulary_is_the_31_tokens_of_the_editions():
    assert len(Vocabulary()) == 31
    assert Vocabulary().encode("A Z'") == [3, 30, 28, 29]


def test_decoding_undoes_encoding_and_stops_at_eos():
    vocabulary = Vocabulary()
    assert vocabulary.decode([SOS, *vocabulary.encode("IT'S HERE"), EOS, 5, 5]) == "IT'S HERE"
    assert vocabulary.decode([PAD, EOS]) == ""


def test_unknown_characters_are_listed_with_the_remedy():
    with pytest.raises(InputError, match=r"'1' 'é'; use --data.normalise-text"):
        Vocabulary().encode("CAFé 1")


def test_a_vocabulary_needs_distinct_characters():
    for characters in ("", "ABA"):
        with pytest.raises(InputError, match="distinct"):
            Vocabulary(characters)


def test_normalising_maps_case_accents_quotes_and_the_rest():
    assert normalise_text("  Caf\u00e9\u2014it\u2019s 5 o'clock! ") == "CAFE IT'S O'CLOCK"
    assert normalise_text("ABC d", "abcd ") == "abc d"


def test_character_file_leaves_symbols_out(tmp_path):
    (tmp_path / "char_set.txt").write_text(" \n'\n<pad>\n<sos/eos>\n<unk>\nA\nB\n")
    assert read_characters(tmp_path / "char_set.txt") == " 'AB"
