"""Texts of a model that does not follow the audio are named; those of a good model are not."""

import pytest

from las_fast.output.faults import describe_fault, repeated_piece

GOOD = ["THE CAT SAT ON THE MAT", "NO NO NO", "HE SAID YES", "I HAVE A DREAM THAT ONE DAY", "WELL WELL WELL THEN"]


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        ("THE " * 5, "THE "),
        ("A" * 20, "A"),
        ("A" * 19, ""),
        ("IT IS " * 4 + "X" * 24, "IT IS "),
        ("ABCDEFG HIJKLMN OPQ" + "ON AND " * 3, "ON AND "),
        ("NEVER WRITE A LONG WORD" + "ON AND " * 3, ""),
        ("ABCDEFGHIJKL" * 3, "ABCDEFGHIJKL"),
        ("ABCDEFGHIJKLM" * 3, ""),
        ("", ""),
    ],
)
def test_a_repeated_piece_fills_half_of_the_text(text, piece):
    assert repeated_piece(text) == piece


def test_the_fault_of_many_texts_is_described():
    blanks = ["", " ", "   "]
    assert describe_fault(blanks) == "3 of 3 texts are blank"
    assert describe_fault([*GOOD, *blanks]) == "3 of 8 texts are blank"
    assert describe_fault([*GOOD, "THE " * 9, "A " * 99]) == "2 of 7 texts repeat one piece, such as 'THE THE THE '"
    assert describe_fault([*GOOD, *["AND THE"] * 5]) == "5 of 10 texts are the same, 'AND THE'"


@pytest.mark.parametrize("texts", [[], [""], GOOD, [*GOOD, ""], [*GOOD, *["YES"] * 4], [*GOOD * 3, "", "", "A" * 50]])
def test_a_few_bad_texts_are_no_fault(texts):
    assert describe_fault(texts) == ""
