"""Options and settings on the command line: a wrong one is one sentence that names the nearest valid one."""

import importlib
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from las_fast import arguments, cli, options
from las_fast.arguments import as_path, as_recording
from las_fast.config import Config, DecodingConfig, SpellerConfig, TeacherForcingStage, to_tree
from las_fast.errors import InputError
from las_fast.options import SYNONYMS, Parser, parse_settings

COMMANDS = (*(module.removeprefix("las_fast.") for module, _ in cli.COMMANDS.values()), "data.spoken", "data.kokoro")


def error_of(capsys, call, *arguments) -> str:
    """The sentence that a call ends with; asserts that the exit status is 2."""
    with pytest.raises(SystemExit) as end:
        call(*arguments)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, out + err
    return err.removeprefix("error: ").rstrip("\n")


def settings_of(*argv) -> Config:
    parser = Parser(prog="job", add_help=False)
    parser.add_argument("--data")
    return parse_settings(parser, list(argv), lambda options: Config())[1]


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("argv", [["--hlep"], ["--hlep=3"], ["--hlep", "3"]])
def test_every_command_names_the_nearest_option(capsys, name, argv):
    main = importlib.import_module(f"las_fast.{name}").main
    assert error_of(capsys, main, argv) == "there is no option --hlep; the nearest is --help"


@pytest.mark.parametrize("name", ["train", "decode", "lm", "tune", "export", "data.spoken", "data.kokoro"])
def test_every_command_names_missing_options(capsys, name):
    main = importlib.import_module(f"las_fast.{name}").main
    assert error_of(capsys, main, []).endswith(" must be given; see --help")


@pytest.mark.parametrize(
    "name,argv,sentence",
    [
        ("decode", ["--chekpoint", "x"], "there is no option --chekpoint; the nearest is --checkpoint"),
        ("decode", ["--on-bad", "skpi"], "--on-bad must be one of error, skip; got 'skpi'; the nearest is skip"),
        ("decode", ["--on-bad", "SKIP"], "--on-bad must be one of error, skip; got 'SKIP'; the nearest is skip"),
        ("decode", ["--on-bad", "x"], "--on-bad must be one of error, skip; got 'x'"),
        ("decode", ["--beam", "two"], "--beam must be a whole number; got 'two'"),
        ("decode", ["--beam", "2.5"], "--beam must be a whole number; got '2.5'"),
        ("decode", ["--beam"], "--beam needs a value (expected one value); see --help"),
        ("decode", ["--out", "~nosuchuser/x"], "--out: ~nosuchuser/x: the home folder of nosuchuser is not known; "
         "write the path without ~"),
        ("decode", ["--out", ""], "--out: the path is empty; give one"),
        ("decode", ["--out", "new/"], "--out: new/ is a folder; give the name of a file to write"),
        ("decode", ["--jsonl", "new/"], "--jsonl: new/ is a folder; give the name of a file to write"),
        ("lm", ["a", "--out", "new/"], "--out: new/ is a folder; give the name of a file to write"),
        ("train", ["--data", ""], "--data: the path is empty; give one"),
        ("train", ["--data", "https://a.org/x"], "--data: https://a.org/x is a URL; give a path on this machine"),
        ("transcribe", ["http://a.org/t.mp3?x=1"], "FILE: http://a.org/t.mp3?x=1 is a URL; give a path on this "
         "machine"),
        ("train", ["--out", ""], "--out: the path is empty; give one"),
        ("transcribe", ["a.wav", "--out", ""], "--out: the path is empty; give one"),
        ("train", ["--out", "new/a.pt"], "--out: new/a.pt has the suffix of a file; give a folder, or add a slash: "
         "new/a.pt/"),
        ("demo", ["--out", "a.HTML"], "--out: a.HTML has the suffix of a file; give a folder, or add a slash: a.HTML/"),
        ("data.spoken", ["--out", "a.zip"], "--out: a.zip has the suffix of a file; give a folder, or add a slash: "
         "a.zip/"),
        ("tune", ["--length-reward", "x"], "--length-reward must be a number; got 'x'"),
        ("tune", ["--length_reward", "1"], "there is no option --length_reward; the nearest is --length-reward"),
        ("lm", ["a.txt", "--out", "x", "--ordr", "3"], "there is no option --ordr; the nearest is --order"),
        ("decode", ["--beam", "3"], "--checkpoint, --data, --split, --out must be given; see --help"),
        ("train", ["--dropout", "3"], "there is no option --dropout; the nearest is --model.listener.dropout"),
        ("train", ["--model.dropout=3"], "there is no option --model.dropout; the nearest is --model.listener.dropout"),
        ("train", ["x", "--lern\x1b=3"], r"there is no option --lern\x1b; see --help"),
        ("transcribe", ["a.wav", "--zzz"], "there is no option --zzz; see --help"),
        ("ops.__main__", ["--foo"], "there is no option --foo; see --help"),
        ("transcribe", ["a.wav", "--vda", "x"], "there is no option --vda; the nearest is --vad"),
        ("transcribe", ["--bem"], "there is no option --bem; the nearest is --beam"),
        ("train", ["--epochs", "3"], "there is no option --epochs; the nearest is --training.epochs"),
        ("train", ["--train.epochs", "3"], "there is no option --train.epochs; the nearest is --training.epochs"),
        ("demo", ["--training.epohcs", "3"], "there is no option --training.epohcs; the nearest is --training.epochs"),
        ("demo", ["--training.epochs", "x"], "--training.epochs must be a whole number; got 'x'"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_a_one_sentence_error(capsys, name, argv, sentence):
    assert error_of(capsys, importlib.import_module(f"las_fast.{name}").main, argv) == sentence


@pytest.mark.parametrize(
    ("name", "argv", "file"),
    [
        ("transcribe", ["-dash.wav"], "-dash.wav"),
        ("transcribe", ["a.wav", "-dash.WAV"], "-dash.WAV"),
        ("transcribe", ["-here"], "-here"),
        ("transcribe", ["--here"], "--here"),
        ("transcribe", ["a.wav", "--out", "-dash.srt"], "-dash.srt"),
        ("attention", ["-hello.wav"], "-hello.wav"),
        ("train", ["--data", "-dash.csv"], "-dash.csv"),
    ],
)
def test_a_file_whose_name_begins_with_a_dash_needs_a_folder_before_it(tmp_path, monkeypatch, capsys, name, argv, file):
    monkeypatch.chdir(tmp_path)
    for here in ("-here", "--here"):
        (tmp_path / here).touch()
    message = error_of(capsys, importlib.import_module(f"las_fast.{name}").main, argv)
    assert message == f"{file} begins with -, so it is read as an option; write ./{file}"


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [(["-absent"], "FILE must be given; see --help"), (["--beam", "x", "--", "-a.wav"], "--beam must be a whole numb")],
)
def test_other_words_with_a_dash_are_not_taken_for_files(tmp_path, monkeypatch, capsys, argv, sentence):
    monkeypatch.chdir(tmp_path)
    assert error_of(capsys, importlib.import_module("las_fast.transcribe").main, argv).startswith(sentence)


def test_the_demo_refuses_wrong_settings_before_it_starts(tmp_path):
    from las_fast import demo

    with pytest.raises(InputError, match=r"training.epochs must be at least 1; got 0"):
        demo.main(["--out", str(tmp_path / "d"), "--training.epochs", "0"])
    with pytest.raises(InputError, match=r"^--beam must be from 1 to 1000; got 100000$"):
        demo.main(["--out", str(tmp_path / "d"), "--beam", "100000"])
    with pytest.raises(InputError, match=r"^--beam-threshold must be a finite number of at least 0; got -1$"):
        demo.main(["--out", str(tmp_path / "d"), "--beam-threshold", "-1"])
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    "argv,sentence",
    [
        (["--training.epochs", "x"], "--training.epochs must be a whole number; got 'x'"),
        (["--training.epochs", "1e3"], "--training.epochs must be a whole number; got '1e3'"),
        (["--training.epochs", "010"], "--training.epochs must be a whole number; got '010'"),
        (["--training.learning-rate", "nan"], "--training.learning-rate must be a number; got 'nan'"),
        (["--training.epochs"], "--training.epochs needs one value; got none"),
        (["--training.epochs", "3", "4"], "--training.epochs needs one value; got 2: 3 4"),
        (["--training.learning-rate", "fast"], "--training.learning-rate must be a number; got 'fast'"),
        (["--data.normalise-text", "maybe"], "--data.normalise-text must be True or False; got 'maybe'"),
        (["--training.schedule", "cosin"], "--training.schedule must be one of cosine, plateau, constant; got 'cosin'; "
         "the nearest is cosine"),
        (["--model.speller.lstm-sizes", "5", "x"], "--model.speller.lstm-sizes must be a whole number; got 'x'"),
        (["--training.teacher-forcing.3.end", "1"], "--training.teacher-forcing.3.end does not exist: "
         "training.teacher-forcing has 3 items, numbered from 0"),
        (["--training.teacher-forcing.0.ende", "1"], "there is no option --training.teacher-forcing.0.ende; the "
         "nearest is --training.teacher-forcing.0.end"),
        (["--training", "3"], "there is no option --training; the nearest is --training.seed"),
        (["stray", "--training.epochs", "3"], "'stray' is not an option or the value of one; see --help"),
        (["--", "--training.epochs", "3"], "there is no option --; see --help"),
        (["-x"], "there is no option -x; see --help"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_a_one_sentence_error(capsys, argv, sentence):
    assert error_of(capsys, settings_of, *argv) == sentence


def test_settings_are_read_in_every_form():
    config = settings_of(
        "--training.epochs=7", "--training.learning_rate", "1e-3", "--model.ctc-layer", "-1", "--data.train", "a", "b",
        "--training.restarts", "--data.normalise-text", "yes", "--data.dev", "460", "--training.epochs", "9",
        "--training.teacher-forcing.1.last", "0.5", "--model.speller.lstm-sizes", "5", "7", "--data.cache=",
        "--training.precision", "bf16",
    )  # fmt: skip
    assert config.training.epochs == 9 and config.training.learning_rate == 1e-3 and config.model.ctc_layer == -1
    assert config.data.train == ("a", "b") and config.training.restarts == () and config.data.normalise_text is True
    assert config.data.dev == "460" and config.data.cache == "" and config.training.precision == "bf16"
    assert config.training.teacher_forcing[1] == TeacherForcingStage(start=20.0, end=40.0, first=1.0, last=0.5)
    assert config.model.speller == SpellerConfig(lstm_sizes=(5, 7))


def test_arguments_default_to_those_of_the_process(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["job", "--data", "here", "--training.epochs", "7"])
    parser = Parser(prog="job", add_help=False)
    parser.add_argument("--data", required=True)
    options, config = parse_settings(parser, None, lambda options: Config())
    assert (options.data, config.training.epochs) == ("here", 7)
    monkeypatch.setattr("sys.argv", ["job", "--dta=x"])
    for read in (parser.parse_args, parser.parse_known_args):
        assert error_of(capsys, read) == "there is no option --dta; the nearest is --data"


def test_a_type_without_a_description_is_named_by_its_function(capsys):
    def date(word):
        raise ValueError

    parser = Parser(prog="job")
    parser.add_argument("--on", type=date)
    parser.add_argument("--share", type=float)
    assert error_of(capsys, parser.parse_args, ["--on", "a b"]) == "--on must be date; got 'a b'"
    assert error_of(capsys, parser.parse_args, ["--share", "x"]) == "--share must be a number; got 'x'"


def test_an_extra_argument_is_refused(capsys):
    parser = Parser(prog="job")
    parser.add_argument("file")
    assert parser.parse_args(["a"]).file == "a"
    assert (
        error_of(capsys, parser.parse_args, ["a", "b", "c"]) == "'b' is not an option or the value of one; see --help"
    )


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_is_shown_at_any_position(monkeypatch, word):
    shown = []

    def show(parser, values):
        shown.append((parser.prog, values))
        raise SystemExit(0)

    monkeypatch.setattr(options, "_print_help", show)
    with pytest.raises(SystemExit):
        settings_of("--data", "x", word)
    settings_of("--data", "x", "--training.epochs", "3")
    assert shown == [("job", Config())]


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_lists_options_then_settings_with_values_and_defaults(capsys, word):
    with pytest.raises(SystemExit) as end:
        settings_of("--data", "x", word)
    options, _, settings = capsys.readouterr().out.partition("\nand any of these settings:\n\n")
    assert end.value.code == 0 and options.startswith("usage: job") and "--data" in options and "job" in settings
    assert re.search(r"--training.wandb \{True,False\}.*?default: False", settings, re.DOTALL)
    assert re.search(r"--training.epochs INT.*?default: 60", settings, re.DOTALL)


def test_options_cannot_be_abbreviated(capsys):
    parser = Parser(prog="job", add_help=False)
    parser.add_argument("--decode")
    _, config = parse_settings(parser, ["--decoding.beam", "3"], lambda options: Config())
    assert config.decoding.beam == 3
    message = error_of(capsys, parse_settings, parser, ["--deco", "3"], lambda options: Config())
    assert message == "there is no option --deco; the nearest is --decode"


def test_a_folder_may_have_the_suffix_of_a_file_with_a_slash_or_if_it_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("old.zip").mkdir()
    for word in ("new.zip/", "old.zip", "runs/v1.2", "run.new", "."):
        assert arguments.as_folder(word) == Path(word)


def test_paths_may_begin_with_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(as_path("~/run")) == "/home/someone/run"


def test_a_dash_is_standard_input_and_a_file_named_so_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [as_recording(word) for word in ("-", "./-", "a.wav")] == [Path("-"), tmp_path / "-", Path("a.wav")]


def parse(argv, default=None):
    parser = Parser(prog="job", add_help=False)
    parser.add_argument("--data", required=True)
    return parse_settings(parser, argv, lambda options: default or Config())


def test_options_and_settings_may_be_mixed():
    options, config = parse(["--training.epochs", "3", "--data", "here", "--decoding.length-penalty", "0.8"])
    assert options.data == "here"
    assert config.training.epochs == 3 and config.decoding.length_penalty == 0.8


def test_omitted_settings_keep_their_defaults():
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

    parser = Parser(prog="job", add_help=False)
    parser.add_argument("--data", required=True)
    with pytest.raises(SystemExit) as end:
        parse_settings(parser, ["--help"], lambda options: Some(), kind=Some)
    out = capsys.readouterr().out
    assert end.value.code == 0 and "--data" in out and "--decoding.length-penalty" in out


def test_help_shows_the_values_of_the_preset(capsys):
    from las_fast import train

    def shown(*argv):
        with pytest.raises(SystemExit):
            train.parse([*argv, "--help"])
        text = re.sub(r"\x1b\[[0-9;]*m|[^ -~\n]", "", capsys.readouterr().out)
        return {name: re.search(rf"--{name} .*?\(default: (\S*)\)", text, re.DOTALL)[1]
                for name in ("features.size", "training.warmup-steps", "model.ctc-layer")}  # fmt: skip

    assert list(shown().values()) == ["80", "200", "-1"]
    assert list(shown("--config", "hw4p2").values()) == ["28", "2000", "1"]
    assert list(shown("--config=hw4p2", "--data", "x").values()) == ["28", "2000", "1"]
    for more in ([], ["--resume"]):
        assert list(shown("--config", "finetune", "--init", "an4", *more).values()) == ["13", "100", "3"]
    with pytest.raises(InputError, match="did you mean hw4p2"):
        train.parse(["--config", "hw4p", "--help"])


@pytest.mark.parametrize(
    ("name", "option", "known"),
    [
        ("train", "--training.lr", "--training.learning-rate"),
        ("train", "--lr", "--training.learning-rate"),
        ("train", "--batch_size", "--data.utterances-per-batch"),
        ("train", "--dropout", "--model.listener.dropout"),
        ("decode", "--beam-size", "--beam"),
        ("decode", "--model", "--checkpoint"),
        ("export", "--output", "--out"),
    ],
)
def test_names_of_other_toolkits_lead_to_ours(capsys, name, option, known):
    main = importlib.import_module(f"las_fast.{name}").main
    assert error_of(capsys, main, [option, "3"]) == f"there is no option {option}; the nearest is {known}"


def test_every_synonym_leads_to_an_option():
    from las_fast import decode

    fields = {f"--{field}" for field in options.field_names(to_tree(Config()))}
    flags = {"--out", "--init", "--device", *decode.parser()._option_string_actions}
    assert set(SYNONYMS.values()) <= fields | flags


@pytest.mark.parametrize("value", ["-1e3", "-1E-2", "-.5", "-2"])
def test_a_negative_number_is_a_value(value):
    parser = Parser()
    parser.add_argument("--limit", type=float)
    parser.add_argument("--values", type=float, nargs="+")
    parser.add_argument("file", nargs="?")
    assert parser.parse_args(["--limit", value]).limit == float(value)
    assert parser.parse_args(["--values", value, "0", value]).values == [float(value), 0, float(value)]
    assert parser.parse_args(["--limit", "1", "--", value]).file == value


def test_a_list_may_begin_after_an_equals_sign(capsys):
    settings = settings_of("--training.restarts=10", "20", "--training.epochs=30")
    assert settings.training.restarts == (10, 20) and settings.training.epochs == 30
    assert "--decoding.beam" in error_of(capsys, settings_of, "--decoding.beam=4", "5")


@pytest.mark.parametrize("words", [["--limit", "-inf"], ["--limit=-inf"], ["--flag", "--limit", "-inf", "x"]])
def test_minus_infinity_is_a_value(words):
    parser = Parser()
    parser.add_argument("--limit", type=float)
    parser.add_argument("--flag", action="store_true")
    parser.add_argument("file", nargs="?")
    assert parser.parse_args(words).limit == -float("inf")
