import argparse
import ctypes
import errno
import os
import subprocess
import sys
from dataclasses import dataclass, field

import pytest

from las_fast import __version__, cli, decode, transcribe, tune
from las_fast.config import Config, DecodingConfig
from las_fast.errors import InputError


def raising(error):
    def main(argv):
        raise error

    return main


def test_bad_input_is_one_sentence_and_status_2(capsys):
    with pytest.raises(SystemExit) as end:
        cli.run(raising(InputError("x.npy is empty")))
    assert end.value.code == 2 and capsys.readouterr().err == "error: x.npy is empty\n"


def test_an_interrupt_ends_with_130():
    with pytest.raises(SystemExit) as end:
        cli.run(raising(KeyboardInterrupt()))
    assert end.value.code == 130


def test_a_full_disk_is_bad_input_and_other_system_errors_are_not_hidden(capsys):
    with pytest.raises(SystemExit) as end:
        cli.run(raising(OSError(errno.ENOSPC, "No space left on device", "out.csv")))
    assert end.value.code == 2 and "no space is left on the disk (out.csv)" in capsys.readouterr().err
    with pytest.raises(OSError):
        cli.run(raising(OSError(errno.EIO, "broken")))


def test_a_reader_that_has_gone_is_no_traceback():
    command = f"{sys.executable} -c 'from las_fast.cli import run; run(lambda _: print(\"x\\n\" * 99999))' | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout == "x\n" and "Traceback" not in done.stderr


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33 or newer")
def test_decoding_gives_large_blocks_back_and_training_keeps_them():
    """Said in a process of its own, which counts its blocks that have pages of their own."""
    script = """
import ctypes
from las_fast import cli
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
class Counts(ctypes.Structure):
    _fields_ = [(str(i), ctypes.c_size_t) for i in range(10)]
libc.mallinfo2.restype = Counts
def own_pages():
    before = getattr(libc.mallinfo2(), "3")
    libc.malloc(ctypes.c_size_t(2 * cli.LARGE_OF_BATCHES))
    return getattr(libc.mallinfo2(), "3") - before
cli.tune_memory()
print(own_pages())
cli.give_large_blocks_back()
print(own_pages())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "1"]


@pytest.mark.parametrize("module", [decode, transcribe, tune])
def test_commands_that_decode_ask_for_it(module, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(module, "give_large_blocks_back", lambda: asked.append(module))
    with pytest.raises(SystemExit):
        module.main(["--help"])
    assert asked == [module]


def test_every_subcommand_leads_to_a_module_with_help(capsys):
    for name in ("train", "decode", "transcribe", "lm", "tune", "ops"):
        with pytest.raises(SystemExit) as end:
            cli.main([name, "--help"])
        assert end.value.code == 0 and "usage" in capsys.readouterr().out


def test_without_a_command_the_commands_are_listed(capsys):
    cli.main([])
    out = capsys.readouterr().out
    assert all(name in out for name in cli.COMMANDS)
    cli.main(["--version"])
    assert capsys.readouterr().out == f"las_fast {__version__}\n"


def test_an_unknown_command_is_named_with_those_there_are(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["transscribe"])
    assert end.value.code == 2 and "'transscribe'; it has train, decode, transcribe" in capsys.readouterr().err


def parse(words, default=None):
    parser = argparse.ArgumentParser(prog="job", add_help=False)
    parser.add_argument("--data", required=True)
    return cli.parse_settings(parser, words, lambda options: default or Config())


def test_options_and_settings_may_be_mixed():
    options, config = parse(["--training.epochs", "3", "--data", "here", "--decoding.length-penalty", "0.8"])
    assert options.data == "here"
    assert config.training.epochs == 3 and config.decoding.length_penalty == 0.8


def test_what_is_not_given_stays_as_the_defaults_have_it():
    default = Config(decoding=DecodingConfig(beam=3))
    assert parse(["--data", "here"], default)[1] == default


def test_switches_and_lists_are_given_by_value():
    _, config = parse(["--data", "x", "--data.normalise-text", "True", "--model.speller.lstm-sizes", "5", "7"])
    assert config.data.normalise_text and config.model.speller.lstm_sizes == (5, 7)


def test_a_misspelt_setting_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as end:
        parse(["--data", "x", "--training.epoch", "3"])
    assert end.value.code == 2 and "--training.epochs" in capsys.readouterr().err


def test_help_lists_options_and_settings(capsys):
    @dataclass(frozen=True)
    class Some:
        decoding: DecodingConfig = field(default_factory=DecodingConfig)

    parser = argparse.ArgumentParser(prog="job", add_help=False)
    parser.add_argument("--data", required=True)
    with pytest.raises(SystemExit) as end:
        cli.parse_settings(parser, ["--help"], lambda options: Some(), kind=Some)
    out = capsys.readouterr().out
    assert end.value.code == 0 and "--data" in out and "--decoding.length-penalty" in out


def test_help_does_not_wait_for_torch():
    code = "import sys; sys.argv = ['x', '--help']\ntry:\n import las_fast.decode as d; d.main(['--help'])\n"
    code += "except SystemExit: sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_an_output_that_is_no_file_is_refused_before_the_work(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="--out .*pipe is not a regular file; give another name"):
        cli.make_room(tmp_path / "pipe", "--out")
    cli.make_room(tmp_path / "new" / "out.csv", "--out")
    assert (tmp_path / "new").is_dir()
