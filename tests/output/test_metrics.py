import pytest

from las_fast.output.metrics import Scores, score


def test_ld_is_the_mean_over_utterances_not_over_batches_or_characters():
    scores = score(["ABCD", "A", "HELLO WORLD"], ["ABCE", "", "HELLO WORLD"])
    assert scores.utterances == 3
    assert scores.ld == pytest.approx(2 / 3)


def test_cer_and_wer_are_percent_of_all_reference_characters_and_words():
    scores = score(["THE CAT SAT", "A DOG"], ["THE CAT", "A DIG"])
    assert scores.cer == pytest.approx(100 * 5 / 16)
    assert scores.wer == pytest.approx(100 * 2 / 5)


def test_error_rates_grow_with_the_edits_and_are_zero_without():
    scores = score(["ABCDEFGH IJ"], ["ABC"])
    assert (scores.ld, scores.cer, scores.wer) == pytest.approx((8, 100 * 8 / 11, 100))
    perfect = score(["AB C", "D"], ["AB C", "D"])
    assert (perfect.ld, perfect.cer, perfect.wer) == (0, 0, 0)
    assert score(["", ""], ["AB", ""]).cer == 200


def test_insertions_deletions_and_substitutions_each_count_once():
    assert score(["ABC"], ["ABXC"]).ld == score(["ABC"], ["AC"]).ld == score(["ABC"], ["AXC"]).ld == 1


def test_spaces_count_as_characters():
    assert score(["A B"], ["AB"]).ld == 1


def test_with_empty_references_every_character_is_an_edit():
    assert score(["", "AB"], ["XY", "AB"]).cer == 100
    assert score([""], ["X Y"]).wer == 200


def test_an_empty_list_scores_zero():
    assert score([], []) == Scores(utterances=0, ld=0, cer=0, wer=0)


def test_lists_of_different_length_are_refused():
    with pytest.raises(ValueError, match="zip"):
        score(["A"], [])
