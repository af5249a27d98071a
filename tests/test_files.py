"""Output files replace neither inputs nor foreign files, and are written atomically; any path works."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest
from fakes import raising
from tiny_checkpoints import make_checkpoint
from tiny_corpora import make_archive

from las_fast import decode, export, lm, train, tune
from las_fast.cli import prepare_streams
from las_fast.config import Config, load_config, to_yaml
from las_fast.errors import InputError
from las_fast.files import (
    expand,
    first_line,
    is_utf8,
    lock_folder,
    make_folder,
    may_be_file_name,
    nearest_path_hint,
    prepare_output_file,
    safetensors_format,
    utf8_path,
    write_atomically,
)
from las_fast.output.submission import write_submission
from las_fast.search.ngram import lm_path_for, save_lm

USERS = "my own notes\n"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("HELLO THERE\n" * 30)
    return path


@pytest.fixture
def archive(tmp_path):
    return make_archive(tmp_path / "data", "F23")


@pytest.fixture
def model(tmp_path):
    return make_checkpoint(tmp_path)


def run_lm(text, out):
    lm.main([str(text), "--order", "2", "--out", str(out)])


def run_decode(archive, model, out, *argv):
    decode.main(["--checkpoint", str(model), "--data", str(archive), "--split", "dev", "--beam", "1", "--out", str(out),
                 *map(str, argv)])  # fmt: skip


@pytest.mark.parametrize("name", ["talk.srt", "talk.wav", "text.txt", "lm.arpa", "lm.json", "best.pt", "x.YAML"])
def test_a_suffix_of_another_kind_of_file_is_refused(text, tmp_path, name):
    with pytest.raises(InputError, match=r"the output is a language model; give a name that ends in .safetensors"):
        run_lm(text, tmp_path / name)
    assert text.read_text().startswith("HELLO")


@pytest.mark.parametrize("name", ["dev.srt", "dev.jsonl", "dev.wav", "run.safetensors", "dev.xlsx", "dev.docx"])
def test_a_submission_is_a_csv(archive, model, tmp_path, name):
    with pytest.raises(InputError, match=r"the output is a submission in CSV; give a name that ends in .csv"):
        run_decode(archive, model, tmp_path / name)


@pytest.mark.parametrize(
    ("name", "is_likely"),
    [
        ("a/talk.docx", True), ("talk.mp3", True), ("x.Z", True), (".talk.abcdefgh", True),
        ("talk", False), (".talk", False), ("talk.", False), ("v1.2", False), ("2026.11.29", False),
        ("Mr. Smith", False), ("talk.abcdefghi", False), ("talk.a-b", False), ("a.wav/talk", False),
        ("talk.wav\n", False),
    ],
)  # fmt: skip
def test_a_short_suffix_that_begins_with_a_letter_is_that_of_a_file(name, is_likely):
    assert may_be_file_name(Path(name)) is is_likely


@pytest.mark.parametrize("name", ["dev.csv", "dev.txt", "dev", "dev.2024", "dev.lm"])
def test_other_suffixes_are_accepted(archive, model, tmp_path, name):
    for _ in range(2):  # its own results may be replaced
        run_decode(archive, model, tmp_path / name, "--jsonl", tmp_path / f"{name}.jsonl")
    assert (tmp_path / name).read_text().startswith("index,label\n")


def test_files_of_the_user_are_not_replaced(archive, model, text, tmp_path):
    for name, run in (
        ("a.csv", lambda out: run_decode(archive, model, out)),
        ("a.jsonl", lambda out: run_decode(archive, model, tmp_path / "new.csv", "--jsonl", out)),
        ("a.safetensors", lambda out: run_lm(text, out)),
        ("b.safetensors", lambda out: export.main(["--checkpoint", str(model), "--out", str(out)])),
        ("b.csv", lambda out: tune.main(["--checkpoint", str(model), "--data", str(archive), "--beam", "1",
                                         "--out", str(out)])),
    ):  # fmt: skip
        out = tmp_path / name
        out.write_text(USERS)
        with pytest.raises(InputError, match=f"{name} exists and is not .*; give another name, or remove it first"):
            run(out)
        assert out.read_text() == USERS


def test_an_empty_file_may_be_replaced(text, tmp_path):
    out = tmp_path / "made by mktemp"
    out.touch()
    run_lm(text, out)
    run_lm(text, out)
    assert safetensors_format(out) == "las_fast lm 2"


def test_checkpoints_and_language_models_do_not_replace_each_other(model, text, tmp_path):
    before = model.read_bytes()
    with pytest.raises(InputError, match="exists and is not a language model"):
        run_lm(text, model)
    run_lm(text, tmp_path / "lm.safetensors")
    with pytest.raises(InputError, match="exists and is not a model"):
        export.main(["--checkpoint", str(model), "--out", str(tmp_path / "lm.safetensors")])
    assert model.read_bytes() == before


@pytest.mark.parametrize("link", [False, True])
def test_inputs_are_not_overwritten(model, text, tmp_path, link):
    out = model
    if link:
        out = tmp_path / "link.safetensors"
        out.symlink_to(model)
    with pytest.raises(InputError, match="is an input of this command and would be replaced; give another name"):
        export.main(["--checkpoint", str(model), "--out", str(out)])
    plain = tmp_path / "text"
    shutil.copy(text, plain)
    with pytest.raises(InputError, match="is an input of this command"):
        run_lm(plain, plain)


def test_an_export_does_not_replace_the_weights_of_a_training(model, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "last.pt").touch()
    shutil.copy(model, run / "best.safetensors")
    with pytest.raises(InputError, match="best.safetensors belongs to the training in"):
        export.main(["--checkpoint", str(model), "--out", str(run / "best.safetensors")])


def test_an_exported_language_model_does_not_overwrite_another_file(model, tmp_path):
    save_lm(lm_path_for(model), lm.train(["AB"], order=1, characters="AB"))
    lm_path_for(tmp_path / "small.safetensors").write_text(USERS)
    with pytest.raises(InputError, match="small.lm.safetensors exists and is not a language model"):
        export.main(["--checkpoint", str(model), "--out", str(tmp_path / "small.safetensors")])


@pytest.mark.parametrize(
    "there,message",
    [
        ("best.safetensors", "holds best.safetensors without last.pt"),
        ("config.yaml", "config.yaml would be overwritten; choose another --out"),
    ],
)
def test_a_training_replaces_neither_weights_nor_settings(archive, tmp_path, there, message):
    run = tmp_path / "run"
    run.mkdir()
    (run / there).write_text("# mine\ntraining:\n  epochs: 1\n")
    with pytest.raises(InputError, match=message):
        train.main(["--config", str(run / "config.yaml") if there == "config.yaml" else "tiny", "--data", str(archive),
                    "--out", str(run)])  # fmt: skip
    assert (run / there).read_text().startswith("# mine")


@pytest.mark.parametrize("text", ["", to_yaml(Config()), to_yaml(load_config("an4"))], ids=["empty", "default", "an4"])
def test_settings_that_a_stopped_training_left_may_be_replaced(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    train.check_run_folder(tmp_path, resume=False)


def test_a_name_that_is_too_long_is_refused_before_the_work(tmp_path):
    with pytest.raises(InputError, match=r"the name xxxxxxxxxxxxxxxxxxxx... has 300 bytes; give one of at most 255"):
        prepare_output_file(tmp_path / ("x" * 300), "--out")
    prepare_output_file(tmp_path / ("x" * 255), "--out")


def test_folders_and_files_may_have_names_that_are_not_utf8(archive, text, tmp_path, capsys):
    prepare_streams()
    folder = tmp_path / os.fsdecode(b"mod\xe0")
    shutil.move(archive, folder / "data")
    shutil.copy(make_checkpoint(tmp_path), folder / "m.safetensors")
    sizes = [f"--model.{name}=6" for name in ("listener.conv-channels", "listener.lstm-size", "speller.key-size",
                                              "speller.value-size", "speller.embedding-size")]  # fmt: skip
    train.main(["--config", "tiny", "--data", str(folder / "data"), "--out", str(folder / "run"), *sizes,
                "--model.speller.lstm-sizes", "9", "8", "--training.epochs", "1"])  # fmt: skip
    assert {"best.safetensors", "last.pt", "tensorboard", "attention"} <= set(os.listdir(folder / "run"))
    export.main(["--checkpoint", str(folder / "run"), "--out", str(folder / os.fsdecode(b"\xff.safetensors"))])
    run_lm(text, folder / os.fsdecode(b"lm\xff"))
    run_decode(folder / "data", folder / os.fsdecode(b"\xff.safetensors"), folder / os.fsdecode(b"\xff.csv"), "--lm",
               folder / os.fsdecode(b"lm\xff"), "--jsonl", folder / os.fsdecode(b"\xff.jsonl"))  # fmt: skip
    assert (folder / os.fsdecode(b"\xff.jsonl")).read_text().count("\n") == 4


def test_ids_that_are_not_utf8_are_written_and_read_back(archive, model, tmp_path):
    name = os.fsdecode(b"mod\xe0")
    for folder, old in ((archive / "dev-clean" / kind, None) for kind in ("mfcc", "transcripts")):
        old = sorted(folder.iterdir())[0]
        old.rename(folder / f"{name}.npy")
    run_decode(archive, model, tmp_path / "dev.csv", "--jsonl", tmp_path / "dev.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "dev.jsonl").read_text(encoding="utf-8").splitlines()]
    assert name in [row["id"] for row in rows]


def test_an_id_that_is_not_utf8_is_escaped_in_a_submission(tmp_path):
    write_submission(tmp_path / "s.csv", [os.fsdecode(b"mod\xe0"), "한"], ["a", "b"])
    assert (tmp_path / "s.csv").read_text(encoding="utf-8") == "id,label\nmod\\udce0,A\n한,B\n"


def test_a_checkpoint_may_have_the_longest_possible_name(archive, model, tmp_path):
    longest = model.rename(tmp_path / ("x" * 243 + ".safetensors"))
    assert len(longest.name) == 255
    run_decode(archive, longest, tmp_path / ("y" * 251 + ".csv"))
    export.main(["--checkpoint", str(longest), "--out", str(tmp_path / ("z" * 243 + ".safetensors"))])


def test_a_write_protected_file_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "a.csv").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: os.path.isdir(path))  # root may write everywhere
    with pytest.raises(InputError, match="a.csv is write-protected; give another name"):
        prepare_output_file(tmp_path / "a.csv", "--out")


@pytest.mark.parametrize("ours", [False, True])
def test_an_existing_file_is_replaced_if_an_earlier_run_wrote_it(tmp_path, ours):
    calls, path = [], tmp_path / "a.csv"
    path.write_text("x")
    prepare_output_file(path, "--out")  # without a rule any file may be replaced
    with contextlib.nullcontext() if ours else pytest.raises(InputError, match="a.csv exists and is not a table"):
        prepare_output_file(path, "--out", what="a table", may_replace=lambda path: calls.append(path) or ours)
    assert calls == [path]


def test_a_folder_is_not_an_output_file(tmp_path):
    with pytest.raises(InputError, match=f"--out {tmp_path} is a folder; give the name of a file to write"):
        prepare_output_file(tmp_path, "--out")


def test_missing_inputs_are_ignored_and_existing_ones_protected(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("x")
    prepare_output_file(path, "--out", inputs=[None, tmp_path / "none", "a\0b"])
    with pytest.raises(InputError, match="is an input of this command"):
        prepare_output_file(path, "--out", inputs=[tmp_path / "none", str(path)])


SUFFIXES_OF_OTHER_FILES = """
    .csv .tsv .txt .json .jsonl .srt .vtt .html .md .yaml .yml .pdf
    .wav .flac .ogg .opus .mp3 .m4a .aac .wma .mp4 .aiff .au .w64 .webm
    .safetensors .pt .pth .npy .npz .arpa .zip .gz .tar .png .jpg .py
    .onnx .ckpt .bin .gguf .h5 .tflite .ts
"""


@pytest.mark.parametrize("suffix", SUFFIXES_OF_OTHER_FILES.split())
def test_a_language_model_never_gets_the_suffix_of_another_file(tmp_path, suffix):
    with pytest.raises(InputError, match="the output is a model; give a name that ends in .lm"):
        prepare_output_file(tmp_path / f"a{suffix}", "--out", what="a model", suffixes=(".lm",))


@pytest.mark.parametrize(("name", "refused"), [("a.CSV", True), ("a.csv", True), ("a.xyz", False), ("a.LM", False)])
def test_only_known_suffixes_are_refused(tmp_path, name, refused):
    with pytest.raises(InputError, match="give a name that ends in .lm") if refused else contextlib.nullcontext():
        prepare_output_file(tmp_path / name, "--out", suffixes=(".lm", ".model"))
    prepare_output_file(tmp_path / name, "--out")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("there/dat", "; the nearest is {}/there/data"),
        ("there/nat", ""),
        ("there/fil", "; the nearest is {}/there/file"),
        ("there/fil/y", "; {}/there exists, but has no fil"),
        ("there/data/y/z", ""),
        ("thre/x/y", "; the nearest is {}/there"),
        ("there/q/y", "; {}/there exists, but has no q"),
        ("there/q", ""),
        ("hid/y", "; {} exists, but has no hid"),
    ],
)
def test_a_missing_path_has_a_hint_to_the_nearest_one(tmp_path, monkeypatch, path, message):
    (tmp_path / "there" / "data" / "y").mkdir(parents=True)
    (tmp_path / "there" / "file").touch()
    (tmp_path / ".hid").mkdir()
    assert nearest_path_hint(tmp_path / path) == message.format(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert nearest_path_hint(Path(path)) == message.format(tmp_path)
    assert nearest_path_hint(Path("/nothing/of/it")) == nearest_path_hint(Path("/nothing")) == ""


def test_the_first_line_of_any_file_can_be_read(tmp_path):
    path = tmp_path / "x"
    for content, line in ((b"\xef\xbb\xbfid,label\r\n1,2\n", "id,label"), (b" a \xff", " a \ufffd"), (b"", ""),
                          (b"a" * 5000, "a" * 4096)):  # fmt: skip
        path.write_bytes(content)
        assert first_line(path) == line
    assert first_line(tmp_path) == first_line(tmp_path / "none") == ""


@pytest.mark.parametrize("name", ["plain", os.fsdecode(b"mod\xe0")])
def test_a_file_of_any_name_can_be_opened_by_a_utf8_name(tmp_path, name):
    (tmp_path / name).write_text("content")
    before = len(os.listdir("/proc/self/fd"))
    with utf8_path(tmp_path / name) as path:
        assert path.encode("utf-8") and Path(path).read_text() == "content"
        assert (path == str(tmp_path / name)) == is_utf8(tmp_path / name) == (name == "plain")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_header_that_is_too_long_is_not_read(tmp_path, monkeypatch):
    content = b'{"__metadata__": {"format": "mine"}}'
    (tmp_path / "x").write_bytes(len(content).to_bytes(8, "little") + content + b"weights")
    assert safetensors_format(tmp_path / "x") == "mine" and safetensors_format(tmp_path / "none") is None
    for limit, known in ((len(content), "mine"), (len(content) - 1, None)):
        monkeypatch.setattr("las_fast.files.MAX_HEADER_BYTES", limit)
        assert safetensors_format(tmp_path / "x") == known


@pytest.mark.parametrize(
    "content",
    [b"", b"short", b"\xff" * 100, b"\xff" * 7 + b"\x7f{}", b"\2" + bytes(7) + b"[]", b"\4" + bytes(7) + b"null"],
)
def test_other_files_have_no_safetensors_header(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    assert safetensors_format(tmp_path / "x") is None


# ----------------------------------------------------------------------------------------------- folders and names


def test_an_unknown_home_folder_is_a_one_sentence_error(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert expand("~/run") == Path("/home/someone/run") and expand("run/~") == Path("run/~")

    def unknown(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", unknown)
    for path, who in (("~/run", "this user"), ("~nobody/run", "nobody")):
        with pytest.raises(InputError, match=f"{path}: the home folder of {who} is not known; write the path without"):
            expand(path)


def test_a_folder_that_cannot_be_made_is_reported_with_the_reason(tmp_path, monkeypatch):
    make_folder(tmp_path / "a" / "b", "--out")
    make_folder(tmp_path / "a" / "b", "--out")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        message = rf"--out: the folder {path} cannot be created \({tmp_path}/file is a file\); choose another"
        with pytest.raises(InputError, match=message):
            make_folder(path, "--out")

    def refused(self, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(InputError, match=r"cannot be created \(Permission denied\)"):
        make_folder(tmp_path / "new", "--out")


@pytest.mark.parametrize("missing", [os.W_OK, os.X_OK])
def test_a_folder_without_write_or_search_permission_is_refused(tmp_path, monkeypatch, missing):
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & missing)  # root ignores permissions
    with pytest.raises(InputError, match=f"--out: the folder {tmp_path} is not writable; choose another"):
        make_folder(tmp_path, "--out")


def test_an_output_that_is_not_a_file_is_refused_before_the_work(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="--out .*pipe is not a regular file; give another name"):
        prepare_output_file(tmp_path / "pipe", "--out")
    prepare_output_file(tmp_path / "new" / "out.csv", "--out")
    assert (tmp_path / "new").is_dir()


def test_the_folder_of_a_links_target_is_made_and_checked_before_the_work(tmp_path, monkeypatch):
    link, target = tmp_path / "link.csv", tmp_path / "new" / "out.csv"
    link.symlink_to(target)
    prepare_output_file(link, "--out")
    write_atomically(link, write_text)
    assert link.is_symlink() and target.read_text() == "new"
    monkeypatch.setattr(os, "access", lambda path, mode: path != target.parent)  # root may write everywhere
    with pytest.raises(InputError, match=f"--out: the folder {target.parent} is not writable; choose another"):
        prepare_output_file(link, "--out")


# --------------------------------------------------------------------------------------------------- atomic writing


def test_a_failed_write_leaves_only_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=r"No space left on device; \d+ MiB are free there\); free some space"):
        write_atomically(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def write_text(path):
    path.write_text("new")


@pytest.mark.parametrize("name", [b"x" * 255, b"\xe0" * 255, "한".encode() * 85, b"mod\xe0.csv", b"-rf", b"a\nb"])
def test_files_of_any_valid_name_can_be_written(tmp_path, name):
    path = tmp_path / os.fsdecode(name)
    for _ in range(2):
        write_atomically(path, write_text)
    assert os.listdir(os.fsencode(tmp_path)) == [name]


def test_a_name_that_is_too_long_is_a_one_sentence_error(tmp_path):
    with pytest.raises(InputError, match=r"x could not be written \(File name too long\); choose another name"):
        write_atomically(tmp_path / ("x" * 256), write_text)
    assert not list(tmp_path.iterdir())


def test_the_error_of_a_write_is_not_hidden_by_cleanup(tmp_path):
    def remove_folder(temporary):
        temporary.parent.rmdir()
        temporary.write_text("x")

    folder = tmp_path / "gone"
    folder.mkdir()
    with pytest.raises(InputError, match=r"No such file or directory\); choose another name or folder"):
        write_atomically(folder / "x", remove_folder)


def test_out_of_memory_is_not_reported_as_a_full_disk(tmp_path):
    def fail(temporary):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(RuntimeError, match="can't allocate memory"):
        write_atomically(tmp_path / "x", fail)


def test_a_link_and_permissions_stay_when_a_file_is_replaced(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    real.chmod(0o600)
    link.symlink_to(real)
    write_atomically(link, write_text)
    assert link.is_symlink() and real.read_text() == "new" and real.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("iostream"), "(the file system accepts no more data; 3 MiB are free there)"),
        (OSError(28, "No space left"), "(No space left; 3 MiB are free there); free some space"),
        (OSError(5, "I/O error"), "(I/O error); choose another name or folder"),
    ],
)
def test_a_failed_write_says_why_and_how_much_is_free(tmp_path, monkeypatch, error, message):
    usage = shutil.disk_usage(tmp_path)._replace(free=3 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError) as end:
        write_atomically(tmp_path / "file", raising(error))
    assert message in str(end.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("no font\nframe 0"), r"no font\); choose another name or folder$"),
        (RuntimeError(), r"RuntimeError\); choose another name or folder$"),
        (OSError(28, "No space left"), r"No space left; 2048 MiB are free there\); free some space"),
    ],
)
def test_an_error_on_a_disk_with_ample_space_is_not_reported_as_a_full_disk(tmp_path, monkeypatch, error, reason):
    usage = shutil.disk_usage(tmp_path)._replace(free=2**31)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=rf"file could not be written \({reason}"):
        write_atomically(tmp_path / "file", raising(error))


def test_the_content_reaches_the_disk_before_the_name(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        kept = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, kept=kept: done.append(name) or kept(*args))
    write_atomically(tmp_path / "file", write_text)
    assert done == ["fsync", "replace"]


def test_another_write_of_the_same_path_does_not_harm_one_in_progress(tmp_path):
    path = tmp_path / "file"

    def write_twice(temporary):
        temporary.write_text("outer")
        write_atomically(path, write_text)
        assert path.read_text() == "new" and temporary.read_text() == "outer"

    write_atomically(path, write_twice)
    assert path.read_text() == "outer" and os.listdir(tmp_path) == ["file"]


def test_what_a_killed_write_left_is_removed_by_the_next(tmp_path):
    def killed(temporary):
        temporary.write_text("half")
        (temporary.parent / "more").touch()
        os._exit(1)

    child = os.fork()
    if not child:
        write_atomically(tmp_path / "file", killed)
    os.waitpid(child, 0)
    assert len(os.listdir(tmp_path)) == 1
    write_atomically(tmp_path / "file", write_text)
    assert os.listdir(tmp_path) == ["file"]


def test_a_temporary_folder_that_is_removed_before_it_is_locked_is_not_used(tmp_path, monkeypatch):
    def remove_once(handle, operation):
        monkeypatch.undo()
        (folder,) = tmp_path.iterdir()
        folder.rmdir()

    monkeypatch.setattr(fcntl, "flock", remove_once)
    write_atomically(tmp_path / "file", write_text)
    assert os.listdir(tmp_path) == ["file"]


def test_files_are_written_where_the_file_system_has_no_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", raising(OSError(errno.ENOLCK, "No locks available")))
    write_atomically(tmp_path / "file", write_text)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("kind", ["file", "link"])
def test_something_else_with_the_name_of_the_temporary_folder_stays(tmp_path, kind):
    other = tmp_path / ".file.1.partial"
    if kind == "file":
        other.write_text("mine")
    else:
        other.symlink_to("nowhere")
    write_atomically(tmp_path / "file", write_text)
    assert sorted(os.listdir(tmp_path)) == [".file.1.partial", "file"]


def test_a_temporary_folder_of_another_user_is_not_used(tmp_path, monkeypatch):
    folder, victim = tmp_path / ".file.1.partial", tmp_path / "victim"
    folder.mkdir()
    victim.write_text("mine")
    (folder / "file").symlink_to(victim)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)  # as where owners are mapped: new folders are ours
    write_atomically(tmp_path / "file", write_text)
    assert victim.read_text() == "mine" and not (tmp_path / "file").is_symlink() and folder.is_dir()
    assert sorted(os.listdir(tmp_path)) == [".file.1.partial", "file", "victim"]


def test_a_folder_whose_lock_file_is_of_another_user_can_be_locked(tmp_path, monkeypatch):
    opened = os.open

    def refuse_the_file(path, *options):
        if Path(path).name == ".lock":
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *options)

    monkeypatch.setattr(os, "open", refuse_the_file)
    refused = pytest.raises(InputError, match="another training is writing into")
    with lock_folder(tmp_path, "training"), refused, lock_folder(tmp_path, "training"):
        pass


def test_an_interrupted_write_leaves_no_files(tmp_path):
    def interrupted(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", interrupted)
    assert list(tmp_path.iterdir()) == []
