"""The entry point of all commands: errors, exit statuses, signals, streams and subcommands."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from fakes import raising
from tiny_checkpoints import make_checkpoint

from las_fast import __version__, cli, progress
from las_fast.errors import JSON_ESCAPES, InputError, SlowPathWarning, Stopped

ROOT = Path(__file__).resolve().parents[1]


def test_bad_input_is_a_one_sentence_error_with_status_2(capsys):
    with pytest.raises(SystemExit) as end:
        cli.run(raising(InputError("x.npy is empty")))
    assert end.value.code == 2 and capsys.readouterr().err == "error: x.npy is empty\n"


@pytest.fixture
def signals():
    """Restore the signal handlers of this process: a stopped command ignores further signals."""
    kept = {s: signal.getsignal(s) for s in cli.STOP_SIGNALS}
    yield
    for s, handler in kept.items():
        signal.signal(s, handler)


@pytest.mark.parametrize(
    ("stop", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (Stopped(signal.SIGTERM), 143, "stopped by SIGTERM"),
        (Stopped(signal.SIGHUP), 129, "stopped by SIGHUP"),
    ],
)
def test_a_signal_sets_the_exit_status_and_a_second_one_is_ignored(signals, capsys, stop, status, message):
    with pytest.raises(SystemExit) as end:
        cli.run(raising(stop))
    assert end.value.code == status and capsys.readouterr().err == f"{message}\n"
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    assert [signal.getsignal(s) for s in numbers] == [signal.SIG_IGN] * 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_raises_an_exception_and_a_second_one_is_ignored(signals, number):
    interrupt = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped) as stop, cli.stop_signals():
        assert signal.getsignal(signal.SIGINT) is interrupt
        try:
            signal.raise_signal(number)
        finally:
            assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP)] == [signal.SIG_IGN] * 2
    assert stop.value.signum == number


def test_signal_handlers_are_restored_after_a_command(signals):
    def handler(signum, frame):
        pass

    signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    with cli.stop_signals():
        assert signal.getsignal(signal.SIGTERM) is not handler and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) is handler and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    with cli.stop_signals():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a handler set by the command itself stays
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_slow_path_is_reported_in_one_line_and_other_warnings_as_usual(capsys):
    usual = warnings.showwarning

    def main(argv):
        warnings.warn("las_fast crawls: no compiler. Run: apt install g++", SlowPathWarning, stacklevel=1)
        warnings.warn("old", DeprecationWarning, stacklevel=1)

    with warnings.catch_warnings(record=True) as others:
        warnings.simplefilter("always")
        cli.run(main)
    assert capsys.readouterr().err == "warning: las_fast crawls: no compiler. Run: apt install g++\n"
    assert [str(other.message) for other in others] == ["old"] and warnings.showwarning is usual


def test_a_command_without_the_extension_says_once_how_to_get_it(tmp_path):
    path = make_checkpoint(tmp_path)
    np.save(tmp_path / "noise.npy", np.random.default_rng(1).normal(0, 0.2, (50, 28)).astype(np.float32))
    code = f"""
import sys; sys.modules['las_fast._C'] = None
import numpy, las_fast
from las_fast import cli
def main(argv):
    model = las_fast.load({str(path)!r})
    for _ in range(3): model.decode(numpy.load({str(tmp_path / "noise.npy")!r}))
cli.run(main)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    advice = "the extension is not built. Run: python setup.py build_ext"
    assert done.stderr == f"warning: las_fast runs on slower PyTorch paths: {advice}\n"


class Output(io.StringIO):
    """A stdout whose flush fails."""

    def __init__(self, error=None):
        super().__init__()
        self.error = error

    def flush(self):
        if self.error is not None:
            raise self.error


FULL = OSError(errno.ENOSPC, "No space left on device")
GONE = BrokenPipeError(errno.EPIPE, "Broken pipe")
SENTENCE = "error: standard output cannot be written (No space left on device); redirect it to another file\n"


@pytest.mark.parametrize(
    ("main", "error", "status", "message", "muted"),
    [
        (lambda argv: None, None, None, "", 0),
        (lambda argv: None, FULL, 2, SENTENCE, 1),
        (lambda argv: None, GONE, 141, "", 1),
        (raising(SystemExit(0)), None, 0, "", 0),
        (raising(SystemExit(0)), FULL, 2, SENTENCE, 1),
        (raising(SystemExit(0)), GONE, 141, "", 1),
        (raising(SystemExit(3)), None, 3, "", 0),
        (raising(SystemExit(3)), FULL, 3, SENTENCE, 1),
        (raising(InputError("no")), None, 2, "error: no\n", 0),
        (raising(InputError("no")), GONE, 141, "error: no\n", 1),
        (raising(GONE), None, 141, "", 2),
    ],
)
def test_the_exit_status_reports_output_that_cannot_be_written(
    monkeypatch, capsys, main, error, status, message, muted
):
    streams = []
    monkeypatch.setattr(sys, "stdout", Output(error))
    monkeypatch.setattr(cli, "mute", streams.append)
    if status is None:
        assert cli.run(main) is None
    else:
        with pytest.raises(SystemExit) as end:
            cli.run(main)
        assert end.value.code == status
    assert capsys.readouterr().err == message
    assert streams == [sys.stdout, sys.stderr][:muted]


def test_run_prepares_memory_and_streams_passes_arguments_and_closes_bars(monkeypatch, capsys):
    order = []
    monkeypatch.setattr(cli, "tune_memory", lambda: order.append("memory"))
    monkeypatch.setattr(cli, "prepare_streams", lambda: order.append("streams"))

    def main(argv):
        order.append(argv)
        progress.ProgressBar(3, "reading", "files")
        raise InputError("x is empty")

    with pytest.raises(SystemExit):
        cli.run(main, ["a", "b"])
    assert order == ["memory", "streams", ["a", "b"]] and not progress._open


@pytest.mark.parametrize(
    "error,sentence",
    [
        (OSError(errno.ENOSPC, "No space left on device", "out.csv"), "no space is left on the disk (out.csv); free"),
        (OSError(errno.ENOSPC, "No space left on device"), "no space is left on the disk (input or output); free"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "out.csv"), "the disk quota is used up (out.csv); free"),
        (PermissionError(errno.EACCES, "Permission denied", "a.yaml"), "a.yaml: permission denied; change its"),
        (OSError(errno.EIO, "Input/output error", "a.npy"), "a.npy could not be read or written (input/output error)"),
        (OSError(errno.EMFILE, "Too many open files", "x"), "too many files are open (x); raise the limit"),
        (OSError(errno.EROFS, "Read-only file system", "x", None, "y"), "x and y lies on a read-only file system"),
        (OSError(errno.ESTALE, "Stale file handle", b"mod\xe0"), r"mod\xe0: Stale file handle; check the path"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "no more processes or threads"),
        (OSError("no errno at all"), "a system call failed (no errno at all)"),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory"), "failed (No usable temporary directory)"),
        (UnicodeEncodeError("utf-8", "\udce0", 0, 1, "surrogates not allowed"), "is not UTF-8 ('utf-8' codec"),
        (UnicodeDecodeError("utf-8", b"\xe0", 0, 1, "unexpected end"), "is not UTF-8 ('utf-8' codec"),
        (RuntimeError("Could not determine home directory."), "no home folder is known; set HOME"),
        (RuntimeError("can't start new thread"), "no more threads; raise ulimit -u"),
        (ValueError("embedded null byte"), "a path contains a NUL character"),
        (MemoryError(), "there is not enough memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "there is not enough memory"),
        (RuntimeError("[enforce] can't allocate memory: you tried to allocate 9"), "there is not enough memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "there is not enough memory"),
        (RuntimeError("could not create a primitive"), "there is not enough memory"),
        (RuntimeError("std::bad_alloc"), "there is not enough memory"),
    ],
    ids=lambda value: repr(value)[:40] if isinstance(value, Exception) else "",
)
def test_errors_from_outside_the_program_are_one_sentence_each(capsys, error, sentence):
    with pytest.raises(SystemExit) as end:
        cli.run(raising(error))
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert sentence in err


@pytest.mark.parametrize("read", [json.loads, yaml.safe_load])
def test_a_file_nested_too_deeply_is_a_one_sentence_error(capsys, read):
    with pytest.raises(SystemExit) as end:
        cli.run(lambda argv: read("[" * 100_000))
    assert end.value.code == 2 and "nested too deeply" in capsys.readouterr().err


def recurse(argv):
    return recurse(argv)


def add(argv):
    return 1 + "1"


@pytest.mark.parametrize(
    "fault,kind",
    [
        (raising(AssertionError("x")), AssertionError),
        (raising(RuntimeError("a shape is wrong")), RuntimeError),
        (raising(ValueError("x")), ValueError),
        (raising(KeyError("x")), KeyError),
        (recurse, RecursionError),
        (add, TypeError),
    ],
)
def test_bugs_keep_their_traceback(fault, kind):
    with pytest.raises(kind):
        cli.run(fault)


def test_an_error_stays_on_one_line_for_any_file_name(capsys):
    with pytest.raises(SystemExit):
        cli.run(raising(InputError(f"{Path(os.fsdecode(b'mod' + bytes([0xE0, 10, 27]) + b'.wav'))} is empty")))
    assert capsys.readouterr().err == "error: mod\\xe0\\n\\x1b.wav is empty\n"


def in_a_shell(code: str, shell: str, **environment) -> subprocess.CompletedProcess:
    """Run a shell command, in which $RUN is a program whose main(argv) has `code` as its body."""
    program = f"from las_fast.cli import *\ndef main(argv):\n    {code}\nrun(main)"
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    environment = {**os.environ, "RUN": program, "PY": sys.executable, **environment}
    return subprocess.run(["bash", "-c", shell], capture_output=True, encoding=encoding, env=environment, cwd=ROOT)


def test_a_full_disk_for_stdout_is_a_one_sentence_error():
    done = in_a_shell("print('x')", '"$PY" -c "$RUN" >/dev/full')
    sentence = "error: no space is left on the disk (input or output); free some\n"
    assert (done.returncode, done.stderr) == (2, sentence)


@pytest.mark.parametrize("code", ["print('x', end='')", "print('x', end=''); sys.exit(0)"])
def test_a_disk_that_fills_at_the_final_flush_is_a_one_sentence_error(code):
    done = in_a_shell(code, '"$PY" -c "$RUN" >/dev/full', PYTHONUNBUFFERED="")
    sentence = "error: standard output cannot be written (No space left on device); redirect it to another file\n"
    assert (done.returncode, done.stderr) == (2, sentence)


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-", "2>/dev/full"])
def test_a_command_runs_with_closed_streams(tmp_path, closed):
    code = f"print('x', file=sys.stderr); print('y'); open(r'{tmp_path}/out', 'w').write('z')"
    done = in_a_shell(code, f'"$PY" -c "$RUN" {closed}')
    expected = 2 if "full" in closed else 0  # a lost warning is an error, a deliberately closed stream is not
    assert done.returncode == expected and "Traceback" not in done.stderr
    if not expected:
        assert (tmp_path / "out").read_text() == "z"  # not in the printed output
        assert done.stdout == ("" if "1" in closed or closed.startswith(">") else "y\n")


def test_a_command_that_only_prints_requires_stdout():
    done = in_a_shell("require_stdout('--out FOLDER')", '"$PY" -c "$RUN" >&-')
    assert done.returncode == 2
    assert done.stderr == "error: standard output is closed, so the results cannot be printed; give --out FOLDER\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_text_can_be_printed_in_any_encoding(encoding):
    code = r"print('한글 \udce0'); print('\u20ac', file=sys.stderr)"
    done = in_a_shell(code, '"$PY" -c "$RUN"', PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert done.stdout.endswith(" \\udce0\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_that_is_printed_stays_json_in_any_encoding(encoding):
    code = r"import json; print(json.dumps('é한😀 \udce0', ensure_ascii=False))"
    done = in_a_shell(code, '"$PY" -c "$RUN"', PYTHONIOENCODING=encoding, PYTHONUTF8="1")
    assert json.loads(done.stdout) == "é한😀 \udce0"


@pytest.mark.parametrize("signal_name,status", [("TERM", 143), ("HUP", 129), ("INT", 130)])
def test_a_command_cleans_up_after_a_signal(tmp_path, signal_name, status):
    code = f"""
    import time
    try:
        print("ready")
        time.sleep(20)
    finally:
        time.sleep(0.2)
        open(r"{tmp_path}/cleaned", "w").close()"""
    child = start(code)
    assert child.stdout.readline() == "ready\n"
    number = getattr(signal, f"SIG{signal_name}")
    child.send_signal(number)
    if signal_name != "INT":
        time.sleep(0.1)
        child.send_signal(number)  # a second signal does not interrupt the clean-up
    _, err = child.communicate()
    message = "interrupted" if signal_name == "INT" else f"stopped by SIG{signal_name}"
    assert (child.returncode, err) == (status, f"{message}\n") and (tmp_path / "cleaned").exists()


def test_a_command_under_nohup_ignores_sighup():
    child = start("print('ready'); import time; time.sleep(0.5); print('done')", "nohup", stdin=subprocess.DEVNULL)
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGHUP)
    assert child.communicate()[0] == "done\n" and child.returncode == 0


def start(code: str, *before: str, **options) -> subprocess.Popen:
    program = f"from las_fast.cli import run\ndef main(argv):\n    {code}\nrun(main)"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    return subprocess.Popen([*before, sys.executable, "-c", program], **pipes, **options)


def test_printing_works_in_any_encoding_and_flushes_each_line(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    out, err = sys.stdout, sys.stderr
    cli.prepare_streams()
    assert (sys.stdout, sys.stderr) == (out, err) and out.errors == err.errors == JSON_ESCAPES
    print("é")
    print("é", file=err, flush=True)
    assert out.buffer.getvalue() == err.buffer.getvalue() == b"\\u00e9\n"


def test_missing_or_replaced_streams_are_no_error(monkeypatch):
    handler = io.StringIO()
    for name, other in (("stdout", "stderr"), ("stderr", "stdout")):
        monkeypatch.setattr(sys, name, None)
        monkeypatch.setattr(sys, other, handler)
        cli.prepare_streams()
        assert getattr(sys, other) is handler
        print("x", file=getattr(sys, name))  # discarded
        getattr(sys, name).close()


@pytest.mark.parametrize(("closed", "opened"), [((), 0), ((0,), 1), ((1,), 1), ((2,), 1), ((0, 1, 2), 3), ((3,), 0)])
def test_descriptors_of_closed_streams_are_not_reused_for_files(monkeypatch, closed, opened):
    def fstat(number):
        if number in closed:
            raise OSError(errno.EBADF, "Bad file descriptor")

    made = []
    system = SimpleNamespace(fstat=fstat, open=lambda *args: made.append(args), devnull="/dev/null", O_RDWR=os.O_RDWR)
    monkeypatch.setattr(cli, "os", system)
    cli.prepare_streams()
    assert made == [("/dev/null", os.O_RDWR)] * opened


def test_require_stdout_raises_only_if_standard_output_is_closed(monkeypatch):
    cli.require_stdout("--out")
    monkeypatch.setattr(sys, "__stdout__", None)
    with pytest.raises(InputError, match="standard output is closed, .*; give --out"):
        cli.require_stdout("--out")


def test_a_closed_output_pipe_gives_no_traceback():
    command = f"{sys.executable} -c 'from las_fast.cli import run; run(lambda _: print(\"x\\n\" * 99999))' | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout == "x\n" and "Traceback" not in done.stderr


NAMES = (
    "train", "decode", "transcribe", "serve", "lm", "tune", "export", "doctor", "report", "attention", "ops", "demo",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_subcommand_has_a_module_with_help(capsys, name):
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 0 and "usage" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"], ["--help", "train"]])
def test_without_a_command_the_commands_are_listed(capsys, argv):
    cli.main(argv)
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "usage: las-fast COMMAND [options]" and lines[-1].startswith("las-fast COMMAND --help lists")
    listed = dict(line.split(maxsplit=1) for line in lines if line.startswith("  "))
    assert tuple(listed) == NAMES == tuple(cli.COMMANDS) and all(len(text.split()) > 3 for text in listed.values())


def test_the_version_is_printed(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"las_fast {__version__}\n"


def test_a_command_gets_the_arguments_after_its_name(monkeypatch):
    seen = []
    monkeypatch.setattr(
        cli.importlib, "import_module", lambda name: SimpleNamespace(main=lambda w: seen.append((name, w)))
    )
    cli.dispatch(["lm", "a.txt", "--out", "x"])
    monkeypatch.setattr(sys, "argv", ["las-fast", "ops", "decode", "--help"])
    cli.dispatch()
    assert seen == [("las_fast.lm", ["a.txt", "--out", "x"]), ("las_fast.ops.__main__", ["decode", "--help"])]


@pytest.mark.parametrize(("word", "advice"), [("transscribe", "; the nearest is transcribe"), ("xyz", "")])
def test_an_unknown_command_is_reported_with_the_known_ones(capsys, word, advice):
    with pytest.raises(SystemExit) as end:
        cli.main([word])
    message = f"error: las-fast has no command '{word}'; it has {', '.join(NAMES)}{advice}\n"
    assert end.value.code == 2 and capsys.readouterr().err == message


@pytest.mark.parametrize("name", ["train", "decode", "transcribe", "lm", "tune", "export", "doctor"])
def test_help_and_wrong_options_do_not_wait_for_torch(name):
    code = f"import sys, las_fast.{name} as command\n"
    for argv in (["--help"], ["--hlep"]):
        code += f"try: command.main({argv})\nexcept SystemExit: pass\n"
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT).returncode == 0


def test_every_command_is_run_by_cli_run():
    package = ROOT / "las_fast"
    texts = {str(path.relative_to(package)): path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    mains = {name: text for name, text in texts.items() if '__name__ == "__main__"' in text}
    del mains["deploy/onnx_greedy.py"]  # an example, which does not import las_fast
    modules = {f"las_fast.{name.removesuffix('.py').replace('/', '.')}" for name in mains}
    assert modules == {module for module, _ in cli.COMMANDS.values()} | {"las_fast.data.spoken", "las_fast.data.kokoro"}
    for name, text in mains.items():
        assert text.rstrip().endswith("run(main)"), name
