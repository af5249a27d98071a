"""Settings in YAML: unquoted values keep their text, and numbers are never guessed."""

import pytest

from las_fast import plain_yaml
from las_fast.errors import InputError
from las_fast.plain_yaml import Plain


@pytest.mark.parametrize(
    ("text", "whole", "real"),
    [
        ("10", 10, 10.0), ("-3", -3, -3.0), ("+3", 3, 3.0), ("0", 0, 0.0), ("1_000", 1000, 1000.0),
        ("010", None, None), ("1__0", None, None), ("1:30", None, None), ("0x10", None, None), ("ten", None, None),
        ("1.5", None, 1.5), (".5", None, 0.5), ("1.", None, 1.0), ("1e-3", None, 1e-3), ("-1.5E+2", None, -150.0),
        (".inf", None, float("inf")), ("+.INF", None, float("inf")), ("-.Inf", None, float("-inf")),
        ("inf", None, None), ("1e", None, None), ("", None, None), ("1 0", None, None),
    ],
)  # fmt: skip
def test_unquoted_numbers_are_parsed_or_rejected(text, whole, real):
    assert plain_yaml.parse_number(Plain(text), int) == whole and plain_yaml.parse_number(Plain(text), float) == real


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("010", "; write it in decimal, without a leading zero"),
        ("-0x1", "; write it in decimal, without a leading zero"),
        ("+08", "; write it in decimal, without a leading zero"),
        ("1:30", "; write minutes and hours as one number"),
        ("ten", ""),
    ],
)
def test_a_number_that_yaml_would_misread_has_a_hint(text, hint):
    from las_fast import tree

    assert tree._hint(int, Plain(text)) == tree._hint(float, Plain(text)) == hint
    assert tree._hint(str, Plain(text)) == tree._hint(int, text) == ""


def test_nan_is_a_float_and_not_an_int():
    actual = plain_yaml.parse_number(Plain(".NaN"), float)
    assert actual != actual and plain_yaml.parse_number(Plain(".nan"), int) is None
    assert plain_yaml.parse_number(Plain("9" * 5000), int) is None  # more digits than Python's limit for int()


def test_booleans_are_six_words():
    for word, value in {"true": True, "Yes": True, "ON": True, "false": False, "No": False, "off": False}.items():
        assert plain_yaml.parse_bool(Plain(word)) is value
    assert all(plain_yaml.parse_bool(Plain(word)) is None for word in ("1", "0", "y", "n", "t", ""))


def test_values_keep_their_text_and_their_line():
    actual = plain_yaml.load('a: 010\nb: "010"\nc:\nd: ~\ne: [no, 2020-01-01]\nf: null\n', "x.yaml")
    assert actual == {"a": "010", "b": "010", "c": None, "d": None, "e": ["no", "2020-01-01"], "f": None}
    assert isinstance(actual["a"], Plain) and not isinstance(actual["b"], Plain)
    assert (actual["a"].line, [item.line for item in actual["e"]]) == (1, [5, 5])
    assert plain_yaml.load("", "x.yaml") is None
    assert plain_yaml.load("[Null, NULL, ~, null, ]", "x.yaml") == [None] * 4 and Plain("x").line == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "x.yaml: a is set twice, in lines 1 and 3; remove one of them"),
        ("a: [1\n", "x.yaml is not YAML: "),
        ("[" * 100_000, "x.yaml is nested too deeply; give a file of settings"),
        ("a: !!int x\n", "x.yaml is not YAML: "),
        ("{a: !!int }", "x.yaml has a value that its tag, such as !!int, does not allow; remove the tag"),
        ("{a: !!bool maybe}", "x.yaml has a value that its tag, such as !!int, does not allow; remove the tag"),
        ("{a: 1, b: 2, a: 3}", "x.yaml: a is set twice, in line 1; remove one of them"),
        ("{[a]: 1}", "x.yaml is not YAML: "),
    ],
)
def test_an_invalid_document_is_a_one_sentence_error(text, message):
    with pytest.raises(InputError) as raised:
        plain_yaml.load(text, "x.yaml")
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value)


def test_values_in_errors_are_short_and_have_their_line():
    assert plain_yaml.got(Plain("010", 4)) == "010 (line 4)" and plain_yaml.got("010") == "'010'"
    assert plain_yaml.got(Plain("word", 2)) == "'word' (line 2)" and plain_yaml.got(None) == "None"
    assert plain_yaml.got(Plain("x" * 80)) == f"'{'x' * 80}'" and len(plain_yaml.got(Plain("x" * 81))) <= 80
    assert plain_yaml.got([1, 2, 3, 4]) == "[1, 2, 3, 4]" and plain_yaml.got([1, 2, 3, 4, 5]) == "[1, 2, 3, 4, ...]"
    assert plain_yaml.got(dict.fromkeys("abcd")) == "{'a': None, 'b': None, 'c': None, 'd': None}"
    assert plain_yaml.got(dict.fromkeys("abcde")) == "{'a': None, 'b': None, 'c': None, 'd': None, ...}"
    assert plain_yaml.got([[[1]]]) == "[[[...]]]" and plain_yaml.got([[]]) == "[[]]"
    assert [len(plain_yaml.got(long)) for long in ("x" * 78, "x" * 79, b"x" * 77, b"x" * 78)] == [80] * 4
    assert "..." not in plain_yaml.got("x" * 78) + plain_yaml.got(b"x" * 77)
    assert Plain.__repr__(Plain("0x1F")) == "0x1F" and repr(Plain("ten")) == "'ten'"
