"""Characters and token ids."""

import pytest

from las_fast.errors import InputError
from las_fast.text import EOS, PAD, SOS, Vocabulary, has_lost_digits, normalise_text


def test_default_vocabulary_is_the_31_tokens_of_the_editions():
    assert len(Vocabulary()) == 31
    assert Vocabulary().encode("A Z'") == [3, 30, 28, 29]


def test_decoding_undoes_encoding_and_stops_at_eos():
    vocabulary = Vocabulary()
    assert vocabulary.decode([SOS, *vocabulary.encode("IT'S HERE"), EOS, 5, 5]) == "IT'S HERE"
    assert vocabulary.decode([PAD, EOS]) == ""
    assert vocabulary.decode([PAD, 3, SOS, 30]) == "A "


def test_unknown_characters_are_listed_with_the_remedy():
    option = "--data.normalise-text True"
    for text, advice in {
        "CAFé": f"'é'; map them with {option}, or give --data.characters",
        "CAFé 1": f"'1' 'é'; write digits as words and map the others with {option}, or give --data.characters",
        "HELLO 5 ½": "'5' '½'; write digits as words, or give --data.characters",
    }.items():
        with pytest.raises(InputError, match=f"vocabulary: {advice}$"):
            Vocabulary().encode(text)


def test_a_long_transcript_is_quoted_by_its_first_40_characters():
    text = "".join(chr(ord("A") + i % 26) for i in range(60)) + "?"
    with pytest.raises(InputError) as caught:
        Vocabulary().encode(text)
    assert str(caught.value).startswith(f"transcript {text[:40]!r} has characters outside the vocabulary: '?'; map")


def test_unknown_characters_are_each_named_once_in_order():
    assert Vocabulary().unknown("zA?z!") == ["!", "?", "z"] and Vocabulary().unknown("A B'") == []


def test_a_vocabulary_needs_distinct_characters():
    for characters in ("", "ABA"):
        with pytest.raises(InputError, match="each given once"):
            Vocabulary(characters)


def test_normalising_maps_case_accents_quotes_and_the_rest():
    assert normalise_text("  Caf\u00e9\u2014it\u2019s 5 o'clock! ") == "CAFE IT'S O'CLOCK"
    assert normalise_text("ABC d", "abcd ") == "abc d"
    assert normalise_text("stra\u00dfe", "AERST\u00df") == "STRA\u00dfE"  # its capital is SS
    assert normalise_text("hola 1\u00ba", "AHLO\u00ba ") == "HOLA \u00ba"  # it has none
    assert normalise_text("AB, cd-", "abcd") == "abcd"  # the vocabulary has no space


def test_case_is_kept_if_the_vocabulary_has_both():
    assert normalise_text("Ab bA, C", "ABab ") == "Ab bA" and normalise_text("aB", "AB ") == "AB"


def test_letters_without_a_unicode_decomposition_are_spelled_out():
    assert normalise_text("C\u0153ur, \u00c6on, Stra\u00dfe, Sm\u00f8r\u01ff") == "COEUR AEON STRASSE SMORO"
    assert normalise_text("\u0152uvre, stra\u00dfe", "abcdefghijklmnopqrstuvwxyz ") == "oeuvre strasse"
    assert normalise_text("\ufb01ne \u2168") == "FINE IX"


def test_a_letter_in_the_vocabulary_is_kept():
    assert normalise_text("cafe\u0301 d\u00e9j\u00e0", "ACDEFJ\u00c9 ") == "CAF\u00c9 D\u00c9JA"


def test_digits_outside_the_vocabulary_are_detected():
    assert has_lost_digits("A 123 B") and has_lost_digits("a \u00bd") and has_lost_digits("\u0663")
    assert not has_lost_digits("A B") and not has_lost_digits("\u2168") and not has_lost_digits("A 1", "A1 ")
