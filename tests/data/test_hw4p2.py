"""HW4P2 archives: each edition is recognised, its files are paired by name, and its order is kept."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from tiny_corpora import EDITIONS, make_archive, make_manifest, save, text_array

from las_fast.config import DataConfig, FeatureConfig
from las_fast.data.dataset import load_dataset
from las_fast.data.hw4p2 import find_archives, read_transcript
from las_fast.data.layouts import open_corpus
from las_fast.data.npy import load_problem, peek_shape
from las_fast.errors import InputError


def load(corpus, split, *, need_text=True, features=None, **options):
    features = features or FeatureConfig(size=corpus.feature_size, normalisation="none")
    data = DataConfig(**options)
    return load_dataset(corpus, (split,), features=features, data=data, need_text=need_text, progress=False)


@pytest.mark.parametrize("edition", EDITIONS)
def test_edition_is_recognised_and_loads(tmp_path, edition):
    layout = EDITIONS[edition]
    archive = make_archive(tmp_path, edition)
    corpus = open_corpus(archive)
    assert (corpus.name, corpus.kind, corpus.header, corpus.numbered) == (layout.name, "features", layout.header, True)
    assert (corpus.feature_size, corpus.transposed) == (layout.size, layout.features == "fbank")
    assert set(corpus.splits) == set(layout.splits)
    train = load(corpus, "train")
    assert all(np.isin(list(text), list("ABCDEFGHIJKLMNOPQRSTUVWXYZ' ")).all() for text in train.texts)
    assert train[0].shape == (train.frame_counts[0], layout.size)
    assert load(corpus, "test", need_text=False).texts == [None] * 4


@pytest.mark.parametrize("edition", EDITIONS)
def test_root_may_be_above_or_below_the_archive(tmp_path, edition):
    archive = make_archive(tmp_path / "downloads", edition)
    split = archive / EDITIONS[edition].splits[0]
    for root in (archive, archive.parent, tmp_path / "downloads", split, split / EDITIONS[edition].features):
        assert open_corpus(root).root == archive


def test_a_folder_beside_the_splits_is_not_the_archive(tmp_path):
    archive = make_archive(tmp_path, "F23")
    (archive / "notes" / "old").mkdir(parents=True)
    for split in sorted(path for path in archive.iterdir() if path.name != "notes"):
        assert find_archives(split) == [archive]
    assert find_archives(archive / "notes") == find_archives(archive / "notes" / "old") == []


def test_an_archive_without_a_test_split_is_still_s22(tmp_path):
    archive = make_archive(tmp_path, "S22")
    shutil.rmtree(archive / "test")
    corpus = open_corpus(tmp_path / "hw4p2_student_data")
    assert (corpus.name, corpus.splits) == ("HW4P2 S22", ("dev", "train"))
    remedy = (
        r"give one of these \(--split, in training --data.train and --data.dev\), or name one of its folders after it"
    )
    with pytest.raises(InputError, match=rf"no split 'test'; it has dev, train; {remedy}$"):
        corpus.resolve("test")


def test_an4_is_recognised_as_s22(shared):
    if not (shared / "an4").is_dir():
        pytest.skip("../shared/an4 is absent")
    corpus = open_corpus(shared / "an4" / "hw4p2_student_data")
    assert corpus.name == "HW4P2 S22"
    assert [len(corpus.utterances(split)) for split in ("train", "dev")] == [844, 104]


def test_another_feature_size_has_a_generic_name(tmp_path):
    archive = make_archive(tmp_path, "F23")
    for path in archive.rglob("mfcc/*.npy"):
        np.save(path, np.load(path)[:, :21])
    corpus = open_corpus(archive)
    assert (corpus.name, corpus.header, corpus.feature_size) == (
        "HW4P2 layout, 21 features",
        ("index", "label"),
        21,
    )


def test_s22_test_rows_follow_the_order_file(tmp_path):
    archive = make_archive(tmp_path, "S22", utterances=9)
    with (archive / "test" / "test_order.csv").open() as file:
        order = [row["file"].removesuffix(".npy") for row in csv.DictReader(file)]
    ids = load(open_corpus(archive), "test", need_text=False).ids
    assert ids == order
    assert ids != sorted(ids)


def test_test_rows_of_other_editions_are_sorted_names_not_directory_order(tmp_path):
    archive = make_archive(tmp_path, "F23", utterances=0)
    for name in ("237-1-0001", "1089-1-0000", "121-1-0000", "1089-1-0010", "1089-1-0002"):
        save(archive / "test-clean" / "mfcc" / f"{name}.npy", np.ones((20, 28), np.float32))
    ids = [u.id for u in open_corpus(archive).utterances("test-clean")]
    assert ids == ["1089-1-0000", "1089-1-0002", "1089-1-0010", "121-1-0000", "237-1-0001"]


def test_order_file_and_recordings_must_agree(tmp_path):
    archive = make_archive(tmp_path, "S22")
    order = archive / "test" / "test_order.csv"
    lines = order.read_text().splitlines()
    order.write_text("\n".join(lines[:-1]))
    with pytest.raises(InputError, match="does not name"):
        open_corpus(archive).utterances("test")
    order.write_text("\n".join([*lines, lines[1]]))
    with pytest.raises(InputError, match="twice"):
        open_corpus(archive).utterances("test")
    names = [line.removesuffix(".npy") for line in lines[1:]]
    rows = [f"1, test/mfcc/{names[0]}.npy", *(f"1, {name}" for name in names[1:])]
    order.write_text("\n".join(["number, file", *rows]))
    assert [u.id for u in open_corpus(archive).utterances("test")] == names
    order.write_text("\n".join(["number, file", *rows[1:], "1"]))  # a short row
    with pytest.raises(InputError, match=f"does not name {names[0]}.npy \\(1 such"):
        open_corpus(archive).utterances("test")
    order.write_text("file\n" + "x" * 200_000)
    with pytest.raises(InputError, match="is not a CSV file"):
        open_corpus(archive).utterances("test")
    order.write_text("name\nx.npy\n")
    with pytest.raises(InputError, match="column 'file'"):
        open_corpus(archive).utterances("test")
    order.write_text("\n".join([*lines, "gone.npy"]))
    with pytest.raises(InputError, match="gone.npy"):
        load(open_corpus(archive), "test", need_text=False)


def test_features_and_transcripts_are_paired_by_name(tmp_path):
    archive = make_archive(tmp_path, "S23", utterances=0)
    names = [f"{n}-1-0000" for n in (1089, 121, 237, 61, 672)]
    for i, name in enumerate(names):
        save(archive / "dev-clean" / "mfcc" / f"{name}.npy", np.full((20, 27), i, np.float32))
    for i, name in reversed(list(enumerate(names))):
        save(archive / "dev-clean" / "transcripts" / f"{name}.npy", text_array("ABCDE"[i], True))
    save(archive / "dev-clean" / "mfcc" / "._copy.npy", np.zeros(1))
    dataset = load(open_corpus(archive), "dev")
    assert dataset.ids == names
    assert [("ABCDE".index(text), int(dataset[i][0, 0])) for i, text in enumerate(dataset.texts)] == [
        (i, i) for i in range(5)
    ]


def test_460_reads_both_training_folders(tmp_path):
    corpus = open_corpus(make_archive(tmp_path, "F23", utterances={"train-clean-100": 3, "train-clean-360": 5}))
    both = ("train-clean-100", "train-clean-360")
    assert corpus.resolve("460") == corpus.resolve("train") == corpus.resolve("train-clean-100+train-clean-360") == both
    assert corpus.resolve("360") == ("train-clean-360",)
    assert len(load(corpus, "460")) == 8
    with pytest.raises(InputError, match="no split '960'"):
        corpus.resolve("960")


def test_s24_trains_on_100_hours_unless_50_are_asked_for(tmp_path):
    corpus = open_corpus(make_archive(tmp_path, "S24"))
    assert corpus.resolve("train") == ("train-clean-100",)
    assert corpus.resolve("train-clean-50") == ("train-clean-50",)
    shutil.rmtree(corpus.root / "train-clean-100")
    assert open_corpus(tmp_path).resolve("train") == ("train-clean-50",)
    other = make_archive(tmp_path / "other", "F23", utterances=1)
    shutil.copytree(other / "train-clean-100", other / "train-clean-50")
    assert len(open_corpus(other).resolve("train")) == 3


@pytest.mark.parametrize(
    ("name", "symbols", "sentences", "edition"),
    [
        ("hw4p2_data", None, False, "HW4P2 S25/F25"),
        ("x", ".", False, "HW4P2 S25/F25"),
        ("x", "..", False, "HW4P2 S25/F25"),
        ("x", None, False, "HW4P2 F24"),
        ("hw4p2_data", ".", True, "HW4P2 F24"),
    ],
)
def test_fbank_editions_are_distinguished_by_their_extra_files(tmp_path, name, symbols, sentences, edition):
    archive = tmp_path / name
    for i in range(2):
        save(archive / "dev-clean" / "fbank" / f"{i}.npy", np.ones((80, 20 + i), np.float32))
    if symbols:
        (archive / symbols / "char_set.txt").touch()
    if sentences:
        (archive / "text-for-LM").mkdir()
    assert open_corpus(archive).name == edition


@pytest.mark.parametrize(
    ("split", "folder", "shape", "name"),
    [
        ("train", "mfcc", (20, 13), "HW4P2 S22"),
        ("train-x", "mfcc", (20, 13), "HW4P2 layout, 13 features"),
        ("dev-x", "mfcc", (20, 13), "HW4P2 layout, 13 features"),
        ("test-x", "mfcc", (20, 13), "HW4P2 layout, 13 features"),
        ("train", "mfcc", (20, 80), "HW4P2 layout, 80 features"),
        ("train", "fbank", (40, 20), "HW4P2 layout, 40 features"),
    ],
)
def test_an_archive_with_one_recording_is_recognised_by_its_folders(tmp_path, split, folder, shape, name):
    save(tmp_path / split / folder / "x.npy", np.ones(shape, np.float32))
    save(tmp_path / "other" / folder / "x.npy", np.ones(shape, np.float32))
    assert open_corpus(tmp_path).name == name


def test_the_frame_size_is_the_most_frequent_one(tmp_path):
    for i, size in enumerate((28, 40, 28)):
        save(tmp_path / "dev" / "mfcc" / f"{i}.npy", np.ones((20 + i, size), np.float32))
    assert open_corpus(tmp_path).feature_size == 28
    (tmp_path / "dev" / "mfcc" / "2.npy").unlink()
    assert open_corpus(tmp_path).feature_size == 28  # the smaller if both are equally common


def test_the_headers_of_eight_files_per_split_are_read(tmp_path):
    for i in range(7):
        save(tmp_path / "dev" / "mfcc" / f"{i}.npy", np.ones(3))
    save(tmp_path / "dev" / "mfcc" / "8.npy", np.ones((20, 28)))
    assert open_corpus(tmp_path).feature_size == 28
    save(tmp_path / "dev" / "mfcc" / "7.npy", np.ones(3))
    with pytest.raises(InputError, match="0.npy and the files next to it are not two-dimensional .npy arrays"):
        open_corpus(tmp_path)


@pytest.mark.parametrize("folder", ["transcript/raw", "transcripts/raw", "transcripts", "transcript", "text"])
def test_transcript_folders_have_many_names(tmp_path, folder):
    save(tmp_path / "dev" / "mfcc" / "x.npy", np.ones((20, 28), np.float32))
    path = save(tmp_path / "dev" / folder / "x.npy", text_array("A", True))
    (tmp_path / "dev" / "transcript" / "raw").mkdir(parents=True, exist_ok=True)  # may be empty
    assert [u.transcript for u in open_corpus(tmp_path).utterances("dev")] == [path]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FileNotFoundError(2, "No such file"), "it does not exist; copy it again or remove its counterpart"),
        (PermissionError(13, "Permission denied"), "it cannot be read (Permission denied); check its name and permis"),
        (OSError("Too few bytes"), "it is truncated or damaged (Too few bytes); copy it again"),
        (
            ValueError(" Object  arrays cannot be loaded"),
            "it contains pickled objects or is not a .npy file; save it as a ",
        ),
        (ValueError("allow_PICKLE=False"), "it contains pickled objects or is not a .npy file; save it as a plain "),
        (EOFError(), "it is truncated or damaged (EOFError); copy it again"),
        (ValueError("cut\noff"), "it is truncated or damaged (cut off); copy it again"),
    ],
)
def test_load_problems_are_explained(error, message):
    assert load_problem(error).startswith(message)


def test_splits_that_share_names_keep_distinct_ids(tmp_path):
    archive = make_archive(tmp_path, "F23", utterances=0)
    for split in ("train-clean-100", "train-clean-360"):
        save(archive / split / "mfcc" / "0.npy", np.ones((20, 28), np.float32))
        save(archive / split / "transcripts" / "0.npy", text_array("A", True))
    assert load(open_corpus(archive), "train").ids == ["train-clean-100/0", "train-clean-360/0"]


@pytest.mark.parametrize(
    "array",
    [
        np.array(["<sos>", "A", " ", "B", "<eos>"]),
        np.array(["A", " ", "B"]),
        np.array("A B"),
        np.array(["A B"]),
        np.array(["<sos/eos>", "A", " ", "B", "<unk>", "<sos/eos>"]),
        np.array([b"A", b" ", b"B"]),
    ],
    ids=["sos and eos", "bare", "one string", "array of one string", "sos/eos", "bytes"],
)
def test_transcripts_of_every_kind_are_read(tmp_path, array):
    assert read_transcript(save(tmp_path / "t.npy", array)) == "A B"


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.array(["AT", "LOOKED"]), "AT LOOKED"),
        (np.array([b"AT", b"LOOKED"]), "AT LOOKED"),
        (np.array(["<sos>", "A", "CAT", "<eos>"]), "A CAT"),
        (np.array(["A ", "CAT "]), "A CAT"),
        (np.array(["[SOS]", "C", "A", "T", "[EOS]"]), "CAT"),
        (np.array(["A", "<space>", "B"]), "A B"),
        (np.array(["A", "|", "B", "|"]), "A B "),
        (np.array("A<space>B"), "A B"),
        (np.array(["A", " ", "BC", "D"]), "A BCD"),
        (np.array(["\u2581THE", "\u2581CA", "T"]), "THE CAT"),
        (np.array(["C", "A", "F", "e\u0301"]), "CAFe\u0301"),
        (np.array(["I", "O"]), "IO"),  # otherwise they look like letters
        (np.array(["<sos>", "<eos>"]), ""),
        (np.array("A  B"), "A  B"),
        (np.array(["<sos>", "A  B", "<eos>"]), "A  B"),
        (np.array(["UH", "HER"]), "UH HER"),
        (np.array(["AT", "IT"]), "AT IT"),
        (np.array(["B", "K", "T"]), "BKT"),  # phonemes of one letter each
        (np.array(["I ", "O "]), "I O "),
    ],
)
def test_words_are_joined_with_spaces_and_letters_are_not(tmp_path, array, text):
    assert read_transcript(save(tmp_path / "t.npy", array)) == text


@pytest.mark.parametrize("word", ["AH", "AW", "AY", "EH", "EL", "EM", "EN", "ER", "OW", "OY", "SH", "SP", "UH"])
def test_a_word_that_is_also_a_phoneme_is_accepted(tmp_path, word):
    assert read_transcript(save(tmp_path / "t.npy", np.array([word, word]))) == f"{word} {word}"


@pytest.mark.parametrize(
    "symbols", ["HH AH L OW", "HH AH0 L OW1", "[SOS] [SIL] K AE T [EOS]", "SIL T UH", "sil k ae t", "K AH P"]
)
def test_phonemes_are_refused_with_the_reason(tmp_path, symbols):
    for array in (np.array(symbols.split()), np.array(symbols.encode().split()), np.array(symbols)):
        with pytest.raises(InputError, match=r"t\.npy contains phonemes .*, not letters; give"):
            read_transcript(save(tmp_path / "t.npy", array))


def test_the_error_quotes_some_phonemes(tmp_path):
    with pytest.raises(InputError, match=rf"contains phonemes \({'AA ' * 10}\), not letters"):
        read_transcript(save(tmp_path / "t.npy", np.array(["AA "] * 20)))


def test_phonemes_in_a_manifest_are_refused_with_the_reason(tmp_path):
    manifest = make_manifest(tmp_path)
    rows = manifest.read_text().splitlines()
    rows[1] = "\t".join([*rows[1].split("\t")[:-1], "HH AH0 L OW1"])
    manifest.write_text("\n".join(rows))
    for normalise_text in (False, True):
        with pytest.raises(InputError, match=r"train-0\.wav: .* contains phonemes, not letters"):
            load(open_corpus(manifest), "train", features=FeatureConfig(), normalise_text=normalise_text)


def test_an_archive_without_transcripts_says_where_they_belong(tmp_path):
    archive = make_archive(tmp_path, "F23")
    (archive / "dev-clean" / "transcripts").rename(archive / "dev-clean" / "labels")
    names = r"\(or in text, transcript, transcript/raw, transcripts, transcripts/raw\)$"
    with pytest.raises(
        InputError, match=rf"'dev-clean' has no transcripts; expected SPLIT/transcripts/NAME.npy {names}"
    ):
        load(open_corpus(archive), "dev")


def make_old_archive(folder):
    """Write the object arrays of an archive from before 2022, with transcripts as words of bytes."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    for split, count in (("train", 3), ("dev", 2), ("test", 2)):
        frames, texts = np.empty(count, object), np.empty(count, object)
        for i in range(count):
            frames[i] = generator.normal(size=(20 + i, 40)).astype(np.float32)
            texts[i] = np.array([b"HELLO", b"THERE"])
        np.save(folder / f"{split}.npy", frames)
        if split != "test":
            np.save(folder / f"{split}_transcripts.npy", texts)


def test_an_older_archive_is_named_with_a_command_that_converts_it(tmp_path):
    make_old_archive(tmp_path / "data")
    for name in ("X.NPY", "Y.npy"):
        shutil.copy(tmp_path / "data" / "train.npy", tmp_path / "data" / name)
    for root in (tmp_path, tmp_path / "data", tmp_path / "data" / "train.npy", tmp_path / "data" / "X.NPY"):
        some = "X.NPY, Y.npy, dev.npy, dev_transcripts.npy, test.npy, train.npy"
        with pytest.raises(InputError, match=rf"has {some}, arrays .* before 2022.* python -c") as error:
            open_corpus(root)
        assert "\n" not in str(error.value)
    (tmp_path / "data" / "notes.txt").touch()
    with pytest.raises(InputError, match="notes.txt is a file"):
        open_corpus(tmp_path / "data" / "notes.txt")
    code = re.search(r'python -c "(.*)"', str(error.value))[1]
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "data", check=True)
    dataset = load(open_corpus(tmp_path / "data" / "new"), "dev")
    assert dataset.texts == ["HELLO THERE"] * 2 and dataset.frame_counts.tolist() == [20, 21]


def test_an_older_archive_is_recognised_by_any_version_of_its_files(tmp_path):
    with (tmp_path / "train.npy").open("wb") as file:
        np.lib.format.write_array(file, np.array([None, "x"]), version=(2, 0))
    with pytest.raises(InputError, match="before 2022"):
        open_corpus(tmp_path)


def test_twenty_files_are_checked_for_an_older_archive(tmp_path):
    for i in range(19):
        (tmp_path / f"{i:02}.npy").touch()
    np.save(tmp_path / "train.npy", np.array([None]), allow_pickle=True)
    with pytest.raises(InputError, match="has train.npy, arrays of Python objects"):
        open_corpus(tmp_path)
    (tmp_path / "19.npy").touch()
    with pytest.raises(InputError, match="no known layout"):
        open_corpus(tmp_path)


def test_a_folder_of_numeric_arrays_is_not_an_older_archive(tmp_path):
    save(tmp_path / "train.npy", np.ones((3, 4)))
    (tmp_path / "empty.npy").touch()
    with pytest.raises(InputError, match="no known layout"):
        open_corpus(tmp_path)


def test_a_file_that_is_not_a_transcript_is_reported(tmp_path):
    numbers = save(tmp_path / "numbers.npy", np.arange(3))
    pickled = tmp_path / "pickled.npy"
    np.save(pickled, np.array(["A", None], object), allow_pickle=True)
    bytes_of_latin1 = save(tmp_path / "bytes.npy", np.array([b"caf\xe9"]))
    np.savez(tmp_path / "many", np.array(["A"]))
    (tmp_path / "many.npz").rename(tmp_path / "many.npy")
    assert peek_shape(pickled) is None
    for path, reason in (
        (numbers, "array of strings, got int64; copy"), (pickled, "pickle"), (tmp_path / "gone.npy", "does not exist"),
        (bytes_of_latin1, "its bytes are not UTF-8"), (tmp_path / "many.npy", "expected an array of strings, got Npz"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=reason) as error:
            read_transcript(path)
        assert str(path) in str(error.value)


DAMAGE = {
    "zip": lambda good: b"PK\x03\x04" + good[4:],
    "huge shape": lambda good: good.replace(b"(", b"(9999999999, ", 1).replace(b" " * 12, b"", 1),
    "impossible shape": lambda good: good.replace(b"(", b"(" + b"9" * 30 + b", ", 1).replace(b" " * 32, b"", 1),
    "open bracket": lambda good: good.replace(b")", b" ", 1),
    "no version": lambda good: good[:6] + b"\x09\x09" + good[8:],
    "empty": lambda good: b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_archive_with_one_damaged_file_opens(tmp_path, damage):
    archive = make_archive(tmp_path, "F23")
    first = open_corpus(archive).utterances("dev-clean")[0]
    for path in (first.path, first.transcript):
        path.write_bytes(DAMAGE[damage](path.read_bytes()))
    corpus = open_corpus(archive)
    assert corpus.feature_size == 28
    with pytest.raises(InputError, match="is not a feature file: .*--on-bad skip") as error:
        load(corpus, "dev")
    assert str(first.path) in str(error.value) and "\n" not in str(error.value)
    assert len(load(corpus, "dev", on_bad="skip")) == 3
    with pytest.raises(InputError, match="is not a transcript") as error:
        read_transcript(first.transcript)
    assert str(first.transcript) in str(error.value)


def test_a_damaged_header_is_always_an_input_error(tmp_path):
    good = save(tmp_path / "x.npy", np.array(list("HELLO"))).read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(good)
        for place in generator.integers(0, 128, 3):
            data[place] = generator.choice(list(b"\0\xff'(){},:0<9 LP\n"))
        (tmp_path / "x.npy").write_bytes(data)
        peek_shape(tmp_path / "x.npy")
        try:
            read_transcript(tmp_path / "x.npy")
        except InputError:
            continue


def test_files_that_macos_adds_to_a_zip_are_ignored(tmp_path):
    archive = make_archive(tmp_path, "F23")
    shutil.copytree(archive, tmp_path / "__MACOSX" / archive.name)
    assert open_corpus(tmp_path).root == archive


def test_an_archive_without_files_is_refused(tmp_path):
    (tmp_path / "train" / "mfcc").mkdir(parents=True)
    with pytest.raises(InputError, match=r"no \.npy files"):
        open_corpus(tmp_path)
    (tmp_path / "train" / "mfcc" / "x.npy").write_bytes(b"")
    with pytest.raises(InputError, match="x.npy"):
        open_corpus(tmp_path)


def test_two_archives_under_one_root_are_an_error_that_names_both(tmp_path):
    make_archive(tmp_path, "S23")
    make_archive(tmp_path, "F23")
    with pytest.raises(InputError, match="several archives .*give one of .*/11-785-f23-hw4p2, .*/data$"):
        open_corpus(tmp_path)


def test_an_edition_is_recognised_by_its_splits_or_its_name(tmp_path):
    s24 = make_archive(tmp_path / "a", "S24")
    renamed = s24.rename(s24.with_name("data"))
    assert open_corpus(renamed).name == "HW4P2 S24"
    s23 = make_archive(tmp_path / "b", "S23")
    assert open_corpus(s23).name == "HW4P2 S23"
    assert open_corpus(s23.rename(s23.with_name("my-S24-copy"))).name == "HW4P2 S24"
