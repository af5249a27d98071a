"""Files in other formats are refused as text, with the name of the format; plain text is accepted."""

import gzip
import json
import zipfile

import pytest

from las_fast import lm
from las_fast.data import plain_text
from las_fast.data.texts import read_texts
from las_fast.errors import InputError
from las_fast.search import ngram

TEXT = ["HELLO THERE", "HOW ARE YOU", "WELL, AND YOU", "I AM < WELL > TOO", "[NOISE] YES", "{LAUGHS} NO", "A | B"]
ROWS = [("1-2", "HELLO THERE", 1.5), ("1-3", "HOW ARE YOU, SIR", 2.5), ("1-4", "WELL", 0.5)]
ARPA = "\\data\\\nngram 1=2\n\n\\1-grams:\n-0.3\tHELLO\t-0.3\n-0.3\tYOU\n\n\\end\\\n"
OTHERS = {
    "model.arpa": (ARPA, "an n-gram model"),
    "model.txt": ("# made by hand\n\n" + ARPA, "an n-gram model"),
    "model.lm": (ARPA.replace("\n", "\r\n"), "an n-gram model"),
    "page.html": ("<html><body><p>HELLO</p></body></html>\n", "HTML or XML"),
    "page.txt": ("\n  <!DOCTYPE html>\nHELLO\n", "HTML or XML"),
    "feed.txt": ('<?xml version="1.0"?>\n<a>HELLO</a>\n', "HTML or XML"),
    "part.txt": ("HELLO\n<p>HOW ARE YOU</p>\n", "HTML or XML"),
    "rows.txt": (json.dumps([{"text": row[1]} for row in ROWS], indent=1), "JSON"),
    "list.txt": (json.dumps([row[1] for row in ROWS]), "JSON"),
    "lines.txt": ("".join(json.dumps({"text": row[1]}) + "\n" for row in ROWS), "JSON"),
    "object.txt": (json.dumps({"texts": [row[1] for row in ROWS]}, indent=2), "JSON"),
    "talk.srt": ("1\n00:00:01,000 --> 00:00:02,000\nHELLO\n", "subtitles"),
    "talk.txt": ("WEBVTT\n\n00:01.000 --> 00:02.000\nHELLO\n", "subtitles"),
    "tabs.txt": ("".join(f"{a}\t{b}\t{c}\n" for a, b, c in ROWS), "a table with columns separated by tabs"),
    "commas.txt": (
        "id,text\n" + "".join(f'{a},"{b}"\n' for a, b, _ in ROWS),
        "a table with columns separated by commas",
    ),
    "semicolons.txt": (
        'Id ; "Text"\n' + "".join(f"{a};{b}\n" for a, b, _ in ROWS),
        "a table with columns separated by semi",
    ),
    "bars.txt": (
        "path|text\n" + "".join(f"{a}|{b}\n" for a, b, _ in ROWS),
        "a table with columns separated by vertical bars",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_other_formats_are_refused_by_name(tmp_path, name, packed):
    text, what = OTHERS[name]
    path = tmp_path / (f"{name}.gz" if packed else name)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    with pytest.raises(InputError, match=f"{path} is {what}[^;]*, not text with one sentence per line; "):
        lm.main([str(path), "--order", "2", "--out", str(tmp_path / "lm.safetensors")])
    assert not (tmp_path / "lm.safetensors").exists()


PACKED = {
    "text.txt": (gzip.compress(b"HELLO THERE\n"), "a gzip file whose name does not end in .gz"),
    "text.zst": (b"\x28\xb5\x2f\xfd" + bytes(20), "a zstd file"),
    "text.xz": (b"\xfd7zXZ\0" + bytes(20), "an xz file"),
    "text.bz2": (b"BZh91AY" + bytes(20), "a bzip2 file"),
    "text.7z": (b"7z\xbc\xaf" + bytes(20), "a 7z archive"),
    "text.rar": (b"Rar!" + bytes(20), "a rar archive"),
    "text.gz": (b"PK\x03\x04" + bytes(20), r"a zip archive \(or an office document\)"),
    "text.tar": (b"text".ljust(257, b"\0") + b"ustar" + bytes(250), "a tar archive"),
    "book.pdf": (b"%PDF-1.7\nHELLO\n", "a PDF document"),
    "book.rtf": (b"{\\rtf1 HELLO}\n", "an RTF document"),
    "lm.bin": (b"mmap lm http://kheafield.com/code format version 5\n\0", "a KenLM language model"),
}


@pytest.mark.parametrize("name", PACKED)
def test_archives_and_documents_are_refused_by_name(tmp_path, name):
    content, what = PACKED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name} is {what}, not text with one sentence per line; "):
        list(read_texts(tmp_path / name))


def test_a_zip_named_txt_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "text.txt", "w") as file:
        file.writestr("a.txt", "HELLO")
    with pytest.raises(InputError, match=r"is a zip archive \(or an office document\), .*; unpack it"):
        list(read_texts(tmp_path / "text.txt"))


def test_the_first_two_hundred_lines_decide_the_format(tmp_path):
    (tmp_path / "a.txt").write_text("HELLO\n" * 199 + "A --> B\n")
    with pytest.raises(InputError, match="is subtitles, not text"):
        list(read_texts(tmp_path / "a.txt"))
    (tmp_path / "a.txt").write_text("HELLO\n" * 200 + "A --> B\n")
    assert list(read_texts(tmp_path / "a.txt"))[200] == "A --> B"


def test_a_packed_text_may_have_an_upper_case_suffix_and_a_text_blank_lines(tmp_path):
    (tmp_path / "A.GZ").write_bytes(gzip.compress(b"HELLO\n  \nYES\n"))
    assert [line for line in read_texts(tmp_path / "A.GZ") if line.strip()] == ["HELLO", "YES"]
    (tmp_path / "a.txt").write_text("  \n[1]\n".replace("1", '"A"'))
    with pytest.raises(InputError, match="is JSON, not text"):
        list(read_texts(tmp_path / "a.txt"))


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_texts_with_few_marks_of_other_formats_are_accepted(tmp_path, end):
    (tmp_path / "a.txt").write_bytes(end.join(TEXT).encode())
    assert [line.strip() for line in read_texts(tmp_path / "a.txt")] == TEXT


def test_sentence_marks_are_not_words(tmp_path):
    (tmp_path / "a.txt").write_text("<s> HELLO THERE </s>\n<s> YES </s>\nNO\n")
    assert [line.strip() for line in read_texts(tmp_path / "a.txt")] == ["HELLO THERE", "YES", "NO"]


def test_a_one_line_text_with_a_comma_or_tab_is_accepted(tmp_path):
    (tmp_path / "a.txt").write_text("WELL,\tYES\n")
    assert len(list(read_texts(tmp_path / "a.txt"))) == 1


@pytest.mark.parametrize("content", [ARPA.encode(), b"mmap lm http://kheafield.com/code\0"])
def test_a_model_of_another_program_is_not_called_damaged(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(InputError, match="is an n-gram model of another program, which las_fast cannot read"):
        ngram.load_lm(tmp_path / "x")


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        (["HELLO", '{"text": 1}', '{"text": 2}'], "JSON"),
        (["HELLO", "THERE", '{"text": 2}', '{"text": 2}'], None),  # exactly half of them
        (["\ufeff[{"], "JSON"),
        (["HELLO", ' {"text": 1}', ' {"text": 2}'], "JSON"),
        (["\ufeff {"], "JSON"),
        (["a"] * 10 + ["</p>"], None),
        (["a"] * 9 + ["</p>"], None),  # exactly a tenth
        (["WEBVTT", "HELLO"], "subtitles"),
        (["ngram 1=5"], "an n-gram model (ARPA)"),
        ([" \\data\\ "], "an n-gram model (ARPA)"),
        (["a\tb", "c\td"], "a table with columns separated by tabs"),
        (["a\tb", "a\tb\tc"], None),
        (["a\tb"], None),
        (["a", "b"], None),
        (["a, b", "c, d"], None),
        (["id,text", "a, b"], "a table with columns separated by commas"),
        (["id,text", "hello"], None),
        (["text, and", "a, b"], None),
        (["a"] * 8 + ["b</p>"], "HTML or XML"),
        (["HELLO", "0:01 --> 0:02"], "subtitles"),
        (["\\DATA\\"], "an n-gram model (ARPA)"),
        ([], None),
    ],
)
def test_a_format_is_recognised_by_more_than_half_of_its_lines_or_a_mark(lines, what):
    actual = plain_text.foreign_format(lines)
    assert actual is None if what is None else actual[0] == what
