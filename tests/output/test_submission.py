import csv

import pytest

from las_fast.errors import InputError
from las_fast.output.submission import write_submission


def test_rows_keep_their_order_and_are_numbered_from_zero(tmp_path):
    write_submission(tmp_path / "s.csv", ["b", "a"], ["ONE", "TWO"], header=("index", "label"), numbered=True)
    assert (tmp_path / "s.csv").read_text() == "index,label\n0,ONE\n1,TWO\n"


def test_without_numbers_the_ids_are_written(tmp_path):
    write_submission(tmp_path / "s.csv", ["b", "a"], ["ONE", "TWO"])
    assert (tmp_path / "s.csv").read_text() == "id,label\nb,ONE\na,TWO\n"


def test_text_is_upper_case(tmp_path):
    write_submission(tmp_path / "s.csv", ["a"], ["it's"])
    assert "a,IT'S\n" in (tmp_path / "s.csv").read_text()


def test_commas_quotes_and_empty_texts_survive_a_csv_reader(tmp_path):
    texts = ["A, B", 'SAY "A"', "", "LINE\nBREAK"]
    write_submission(tmp_path / "s.csv", list("abcd"), texts)
    with (tmp_path / "s.csv").open(newline="") as file:
        assert [row["label"] for row in csv.DictReader(file)] == texts


def test_the_folder_is_made(tmp_path):
    write_submission(tmp_path / "new" / "deep" / "s.csv", ["a"], ["A"])
    assert [p.name for p in (tmp_path / "new" / "deep").iterdir()] == ["s.csv"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "s.csv"
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(InputError, match="No space left"):
        write_submission(path, ["a"], ["A"])
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
