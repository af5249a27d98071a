"""Folder listings and text files in every layout: which files count, and where lines end."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_corpora import (
    make_archive,
    make_audio_folder,
    make_common_voice,
    make_kaldi,
    make_librispeech,
    make_manifest,
    save,
)

from las_fast.data import folders as files_module
from las_fast.data.folders import is_hidden, list_at_depth, list_folder, read_lines
from las_fast.data.hw4p2 import _test_order, read_transcript
from las_fast.data.kaldi import open_kaldi
from las_fast.data.layouts import open_corpus
from las_fast.data.librispeech import read_transcripts
from las_fast.data.manifest import open_manifest
from las_fast.data.texts import read_texts
from las_fast.errors import InputError

CLUTTER = (".DS_Store", "._{}", "Thumbs.db", "desktop.ini", "~${}", "readme.md")
CLUTTER_FOLDERS = ("__MACOSX", ".ipynb_checkpoints", "@eaDir", "lost+found", "$RECYCLE.BIN")
LAYOUTS = {
    "archive": lambda root: make_archive(root, "F23"),
    "ordered archive": lambda root: make_archive(root, "S22"),
    "LibriSpeech": lambda root: make_librispeech(root, utterances=1, splits=("train-clean-100", "dev-clean")),
    "tsv": make_manifest,
    "jsonl": lambda root: make_manifest(root, suffix=".jsonl"),
    "Common Voice": make_common_voice,
    "Kaldi": make_kaldi,
    "audio folder": make_audio_folder,
}


def add_clutter(root):
    """Add to every folder the hidden files that systems and editors leave, named after the files in it."""
    for folder, _, names in list(os.walk(root)):
        for name in [*names, *(pattern.format(name) for pattern in CLUTTER for name in (names or ["x"]))]:
            if not os.path.exists(os.path.join(folder, name)):
                with open(os.path.join(folder, name), "wb") as file:
                    file.write(b"\0\x05\x16\x07\xff")
        for hidden in CLUTTER_FOLDERS:
            os.mkdir(os.path.join(folder, hidden))
            for name in names:
                shutil.copy(os.path.join(folder, name), os.path.join(folder, hidden, name))


def contents(corpus):
    return {split: corpus.utterances(split) for split in corpus.splits}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hidden_and_system_files_are_ignored_in_every_layout(tmp_path, layout):
    LAYOUTS[layout](tmp_path)
    plain = open_corpus(tmp_path)
    before = contents(plain)
    add_clutter(tmp_path)
    cluttered = open_corpus(tmp_path)
    assert contents(cluttered) == before
    assert (cluttered.name, cluttered.roles) == (plain.name, plain.roles)


def test_hidden_files_are_no_text_for_a_language_model(tmp_path):
    for i in range(2):
        save(tmp_path / f"{i}.npy", np.array(list("HELLO")))
    add_clutter(tmp_path)
    assert list(read_texts(tmp_path)) == ["HELLO"] * 2


def test_hidden_files_are_recognised_by_name():
    hidden = (".x", "._a.flac", "~$table.csv", "__MACOSX", "THUMBS.DB", "ehthumbs.db", "Desktop.ini", "Icon\r",
              "@eaDir", "#recycle", "lost+found", "$RECYCLE.BIN", "System Volume Information")  # fmt: skip
    assert all(map(is_hidden, hidden))
    assert not any(map(is_hidden, ("x", "a.b", "_x.wav", "~x.wav", "x~", "@x", "found", "$x")))


def test_suffixes_may_be_in_upper_case(tmp_path):
    archive = make_archive(tmp_path / "a", "F23")
    speech = make_librispeech(tmp_path / "b", utterances=1, splits=("dev-clean",))
    before = [len(open_corpus(root).utterances("dev-clean")) for root in (archive, speech)]
    for path in [*archive.rglob("*.npy"), *speech.rglob("*.flac"), *speech.rglob("*.txt")]:
        path.rename(path.with_name(path.stem.upper() + path.suffix.upper()))
    assert [len(open_corpus(root).utterances("dev-clean")) for root in (archive, speech)] == before
    utterance = open_corpus(speech).utterances("dev-clean")[0]
    assert utterance.transcript and utterance.path.exists()
    test = speech / "LibriSpeech" / "test-clean"
    shutil.copytree(
        speech / "LibriSpeech" / "dev-clean", test, ignore=lambda _, names: [n for n in names if "TXT" in n]
    )
    assert open_corpus(speech).splits == ("dev-clean", "test-clean")


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"a\nb\n", ["a", "b"]), (b"a\r\nb\r\n", ["a", "b"]), (b"a\rb\r", ["a", "b"]), (b"a\r\r\nb", ["a", "b"]),
        (b"a\nb\r", ["a", "b"]),
        (b"\xef\xbb\xbfa\nb", ["a", "b"]), (b"a\rx\nb", ["a x", "b"]), (b"a\n\n\n", ["a", "", ""]), (b"", []),
        ("a\u2028b\u0085c\x0b\x0c\x1cd\n".encode(), ["a\u2028b\u0085c\x0b\x0c\x1cd"]),
        ("é\r\n中\n".encode("utf-16"), ["é", "中"]), ("﻿a\nb".encode("utf-16-be"), ["a", "b"]),
        ("a\nb".encode("utf-32"), ["a", "b"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("block", [4, 1 << 20])
def test_lines_are_read_in_every_encoding(tmp_path, monkeypatch, data, lines, block):
    monkeypatch.setattr(files_module, "BLOCK_BYTES", block)
    (tmp_path / "x.txt").write_bytes(data)
    for name in ("x.txt.gz", "X.GZ"):
        (tmp_path / name).write_bytes(gzip.compress(data))
        assert list(read_lines(tmp_path / name)) == lines
    assert list(read_lines(tmp_path / "x.txt")) == lines


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"{}\n{}\n\xff\n", "line 3 is not UTF-8"), (b"{}\n" * 9 + b"\xe9", "line 10 is not UTF-8"),
     (b"{}\n{}\0\n", "line 2 contains a NUL"), (b"{}\n{}\n\0", "line 3 contains a NUL"),
     ("ab".encode("utf-16-le"), "line 1 contains a NUL"),
     (b"\xff\xfea", "line 1 is not UTF-8")],
)  # fmt: skip
@pytest.mark.parametrize("name", ["x.txt", "m.tsv", "m.jsonl", "m.csv", "1.trans.txt"])
def test_a_file_that_is_not_text_is_reported_with_its_line(tmp_path, monkeypatch, data, message, name):
    monkeypatch.setattr(files_module, "BLOCK_BYTES", 4)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=f"{name} {message}") as error:
        list(read_texts(tmp_path / name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["m.tsv", "m.csv", "m.jsonl", "m.json"])
def test_a_manifest_with_a_mistake_is_still_found_in_its_folder(tmp_path, name):
    head = b'{"path": "a.wav"}\n' if "js" in name else b"path\na.wav\n"
    (tmp_path / name).write_bytes(head + b"caf\xe9.wav\n")
    with pytest.raises(InputError, match=f"{name} line {2 if 'js' in name else 3} is not UTF-8"):
        open_corpus(tmp_path)


def test_an_unreadable_text_is_reported_with_the_reason(tmp_path):
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"some text" * 99)[:-20])
    for name, why in (("cut.gz", "Compressed file ended"), ("gone", "No such file"), ("", "Is a directory")):
        with pytest.raises(InputError, match=rf"cannot be read \({why}"):
            list(read_lines(tmp_path / name))


@pytest.mark.parametrize("form", ["bom", "crlf", "cr", "utf-16"])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "archive"])
def test_every_text_of_every_layout_is_read_in_every_encoding(tmp_path, layout, form):
    LAYOUTS[layout](tmp_path)
    before = contents(open_corpus(tmp_path))
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        if path.suffix in (".txt", ".tsv", ".csv", ".jsonl") or path.name in ("wav.scp", "text", "segments"):
            text = path.read_text(encoding="utf-8")
            text = text.replace("\n", {"crlf": "\r\n", "cr": "\r"}.get(form, "\n"))
            encoding = {"bom": "utf-8-sig", "utf-16": "utf-16"}.get(form, "utf-8")
            path.write_bytes(text.encode(encoding))
    assert contents(open_corpus(tmp_path)) == before


def test_a_folder_that_cannot_be_listed_is_reported(tmp_path, monkeypatch):
    archive = make_archive(tmp_path / "data", "F23")
    (tmp_path / "data" / "private").mkdir()
    known, closed = os.scandir, {str(tmp_path / "data" / "private")}

    def scandir(path):
        if str(path) in closed:
            raise PermissionError(13, "Permission denied", str(path))
        return known(path)

    monkeypatch.setattr(files_module.os, "scandir", scandir)
    corpus = open_corpus(tmp_path / "data")  # folders beside the data do not matter
    assert corpus.root == archive
    closed.add(str(archive / "dev-clean" / "mfcc"))
    with pytest.raises(InputError, match=r"dev-clean/mfcc cannot be listed: Permission denied"):
        corpus.utterances("dev-clean")
    with pytest.raises(InputError, match="cannot be listed"):
        list_folder(tmp_path / "gone")


@pytest.mark.parametrize(("closed", "message"), [(".", "data cannot be listed: Perm"), ("a", "no known layout")])
def test_a_folder_with_only_unreadable_folders_is_refused(tmp_path, monkeypatch, closed, message):
    def scandir(path):
        if Path(path) == tmp_path / "data" / closed:
            raise PermissionError(13, "Permission denied", str(path))
        return known(path)

    (tmp_path / "data" / "a").mkdir(parents=True)
    known = os.scandir
    monkeypatch.setattr(files_module.os, "scandir", scandir)
    with pytest.raises(InputError, match=message):
        open_corpus(tmp_path / "data")


def test_circular_links_are_not_followed_forever(tmp_path):
    speech = make_librispeech(tmp_path, utterances=1, splits=("train-clean-100", "dev-clean")) / "LibriSpeech"
    before = contents(open_corpus(tmp_path))
    (speech / "dev-clean" / "loop").symlink_to(speech / "dev-clean")
    (speech / "dev-clean" / "1090" / "loop").symlink_to(speech / "dev-clean" / "1090")
    (speech / "dev-clean" / "self").symlink_to(speech / "dev-clean" / "self")
    assert contents(open_corpus(tmp_path)) == before
    assert list(list_at_depth(speech / "dev-clean" / "1090", 0)) == [
        speech / "dev-clean" / "1090" / name for name in ("134686", "loop")
    ]


def test_a_link_to_an_archive_is_not_a_second_archive(tmp_path):
    archive = make_archive(tmp_path, "F23")
    (tmp_path / "newest").symlink_to(archive)
    corpus = open_corpus(tmp_path)
    assert corpus.root == archive and len(corpus.utterances("dev-clean")) == 4


def test_names_in_texts_are_found_where_the_locale_is_not_utf8(tmp_path):
    make_librispeech(tmp_path / "speech", utterances=1, splits=("dev-clean",))
    for path in (tmp_path / "speech").rglob("*-0000.flac"):
        path.rename(path.with_name(path.name.replace("-0000", "-한")))
    for path in (tmp_path / "speech").rglob("*.trans.txt"):
        path.write_text(path.read_text().replace("-0000", "-한"), encoding="utf-8")
    make_kaldi(tmp_path)
    shutil.copytree(tmp_path / "wav", tmp_path / "한")
    scp = tmp_path / "data" / "dev" / "wav.scp"
    scp.write_text(scp.read_text().replace("wav/", "한/"), encoding="utf-8")
    (tmp_path / "m.tsv").write_text("path\n한/dev0.wav\n", encoding="utf-8")
    code = (
        "import sys; from pathlib import Path; from las_fast.data import kaldi, librispeech, manifest; "
        "found = manifest.open_manifest(Path('m.tsv')).utterances('all') + kaldi.open_kaldi(Path('data'))"
        ".utterances('dev') + librispeech.open_librispeech(Path('speech/LibriSpeech')).utterances('dev-clean'); "
        "print(sys.getfilesystemencoding(), [u.path.exists() for u in found], [bool(u.transcript) for u in found])"
    )
    environment = os.environ | {
        "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(Path(__file__).parents[2]),
    }  # fmt: skip
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert out.stdout.strip() == f"ascii {[True] * 7} {[False] + [True] * 6}", out.stderr


def test_names_in_texts_use_the_encoding_of_the_file_system(tmp_path, monkeypatch):
    there = "ü".encode().decode("latin-1")
    (tmp_path / f"{there}.wav").touch()
    (tmp_path / "m.tsv").write_text("path\nü.wav\n", encoding="utf-8")
    (tmp_path / "order.csv").write_text("file\nü.npy\n", encoding="utf-8")
    (tmp_path / "x.trans.txt").write_text("ü A\n", encoding="utf-8")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "wav.scp").write_text("x ü.wav\n", encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsdecode", lambda name: name.decode("latin-1"))
        paths = [u.path for u in (*open_manifest(tmp_path / "m.tsv").utterances("all"),
                                  *open_kaldi(tmp_path / "dev").utterances("all"))]  # fmt: skip
        names = [*_test_order(tmp_path / "order.csv", [there]), read_transcripts(tmp_path / "x.trans.txt")[0][0]]
    assert paths == [tmp_path / f"{there}.wav"] * 2 and names == [there] * 2


def test_names_that_are_not_utf8_and_long_ones_are_read(tmp_path):
    archive = make_archive(tmp_path, "F23")
    for name in (b"mod\xe0", b"x" * 251):
        for folder, array in (("mfcc", np.ones((9, 28), np.float32)), ("transcripts", np.array(list("HI")))):
            with open(os.fsencode(archive / "dev-clean" / folder) + b"/" + name + b".npy", "wb") as file:
                np.save(file, array)
    utterances = {os.fsencode(u.id): u for u in open_corpus(archive).utterances("dev-clean")}
    for name in (b"mod\xe0", b"x" * 251):
        assert utterances[name].path.exists() and read_transcript(utterances[name].transcript) == "HI"
