"""The demo, with training and decoding replaced by fast fakes."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest

from las_fast import decode, demo, train
from las_fast.config import load_config
from las_fast.data import spoken
from las_fast.errors import InputError

SIZES = ["--train", "3", "--dev", "1", "--test", "4"]


class Stages:
    """Replaces train.main and decode.main, and records their calls."""

    def __init__(self, out):
        self.out, self.trained, self.decoded, self.interrupt = out, [], [], False

    def train(self, argv):
        self.trained.append(argv)
        folder = self.out / "run"
        (folder / "attention").mkdir(parents=True, exist_ok=True)
        (folder / "last.pt").write_bytes(b"state")
        if self.interrupt:
            raise KeyboardInterrupt
        monitor = {"diagonal": 1, "sharp": 1, "monotonic": 1, "coverage": 1, "formed": True}
        scores = {"loss": 1.0, "ld": 1.0, "cer": 1.0, "wer": 1.0}
        row = {"kind": "valid", "epoch": 1.0, **scores, "monitor": monitor, "line": ""}
        (folder / "log.jsonl").write_text(json.dumps(row) + "\n")
        arrays = {"weights_0": np.eye(2, 5, dtype=np.float32), "text_0": np.array("A")}
        np.savez(folder / "attention" / "epoch-0001.00.npz", ids=np.array(["x"]), **arrays)

    def decode(self, argv):
        self.decoded.append(argv)
        options = dict(zip(argv[::2], argv[1::2], strict=True))
        truth = spoken.read_test_transcripts(self.out / "data")
        texts = [truth[name][0] for name in sorted(truth)]
        texts[0] = texts[0][1:]  # one character is missing
        with open(options["--out"], "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("index", "label"), *enumerate(texts)])
        print("data: something")
        print(json.dumps({"utterances": 4, "seconds": 0.5, "audio_seconds": 8.0, "rtfx": 16.0}))


@pytest.fixture
def stages(tmp_path, monkeypatch):
    pytest.importorskip("espeakng_loader", reason="eSpeak NG is not installed")
    stages = Stages(tmp_path / "new" / "demo")
    monkeypatch.setattr(train, "main", stages.train)
    monkeypatch.setattr(decode, "main", stages.decode)
    return stages


def run_demo(stages, *more):
    demo.main(["--out", str(stages.out), *SIZES, *more])


def test_one_command_makes_corpus_submission_result_and_report(stages, capsys):
    run_demo(stages)
    out = stages.out
    result = json.loads((out / "result.json").read_text())
    assert list(result) == ["utterances", "ld", "cer", "wer", "seconds", "audio_seconds", "rtfx"]
    characters = sum(len(text) for text, _ in spoken.read_test_transcripts(out / "data").values())
    assert result["utterances"] == 4 and result["ld"] == 0.25
    assert result["cer"] == round(100 / characters, 4)
    assert (out / "result.json").read_text() == json.dumps(result, indent=1) + "\n"
    assert (result["seconds"], result["audio_seconds"], result["rtfx"]) == (0.5, 8.0, 16.0)
    page = (out / "report.html").read_text()
    assert "3 of 4 have no error" in page and "<h1>las_fast demo: a spoken corpus</h1>" in page
    assert f"<b>{result['cer']:.2f} %</b><span>CER</span>" in page
    printed = capsys.readouterr().out
    for wanted in (
        "[1/4]",
        "[4/4] took",
        "reference",
        "hypothesis",
        str(out / "report.html"),
        "CER",
        "data: something",
    ):
        assert wanted in printed
    archive = ["--data", str(out / "data" / spoken.ARCHIVE)]
    folders = ["--out", str(out / "run"), "--data.cache", str(out / "cache")]
    assert stages.trained == [["--config", "tiny", *archive, *folders]]
    submission = ["--split", "test-clean", "--out", str(out / "submission.csv"), "--beam", "8"]
    assert stages.decoded == [["--checkpoint", str(out / "run"), *archive, *submission]]
    headings = [line for line in printed.splitlines() if line.startswith("[")]
    assert [h for h in headings if "took" not in h] == [
        "[1/4] synthesising the corpus", "[2/4] training, preset tiny", "[3/4] decoding test-clean, beam 8",
        "[4/4] scoring and reporting",
    ]  # fmt: skip
    assert [h[:10] for h in headings if "took" in h] == [f"[{n}/4] took" for n in (1, 2, 3, 4)]


def test_the_decoder_gets_the_beam_and_its_threshold(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(decode, "main", lambda argv: calls.append(argv) or print('{"cer": 1.0}'))
    assert demo.decode(tmp_path, tmp_path / "data", 3) == {"cer": 1.0}
    assert calls[0][-2:] == ["--beam", "3"] and "--beam-threshold" not in calls[0]
    options, _ = demo.parse(["--beam-threshold", "0"])
    demo.decode(tmp_path, tmp_path / "data", options.beam, options.beam_threshold)
    assert calls[1][-4:] == ["--beam", "8", "--beam-threshold", "0.0"]


def test_a_second_run_keeps_corpus_and_training(stages, capsys):
    run_demo(stages)
    made = (stages.out / "data" / "corpus.json").stat().st_mtime_ns
    run_demo(stages)
    assert len(stages.trained) == 1 and len(stages.decoded) == 2
    assert (stages.out / "data" / "corpus.json").stat().st_mtime_ns == made
    assert capsys.readouterr().out.count("is kept") == 2


def test_other_sizes_repeat_corpus_and_training(stages):
    run_demo(stages)
    run_demo(stages, "--train", "4")
    assert len(stages.trained) == 2
    assert "--resume" not in stages.trained[1]
    assert spoken.is_current(stages.out / "data", train=4, dev=1, test=4, seed=1)


def test_other_settings_repeat_the_training_and_are_passed_on(stages):
    run_demo(stages)
    run_demo(stages, "--training.epochs", "2")
    assert stages.trained[1][-2:] == ["--training.epochs", "2"]


def test_an_interrupted_training_is_resumed(stages, capsys):
    stages.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        run_demo(stages)
    assert "run the same demo command to continue" in capsys.readouterr().err
    stages.interrupt = False
    run_demo(stages)
    assert stages.trained[1] == [*stages.trained[0], "--resume"]
    run_demo(stages)
    assert len(stages.trained) == 2


def test_an_interrupted_training_with_other_settings_starts_over(stages):
    stages.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        run_demo(stages)
    stages.interrupt = False
    run_demo(stages, "--training.epochs", "2")
    assert "--resume" not in stages.trained[1]


def test_fresh_makes_everything_again(stages):
    run_demo(stages)
    run_demo(stages, "--fresh")
    assert len(stages.trained) == 2 and "--resume" not in stages.trained[1]


def test_a_training_not_made_by_the_demo_is_left_unchanged(stages):
    (stages.out / "run").mkdir(parents=True)
    (stages.out / "run" / "last.pt").write_bytes(b"precious")
    with pytest.raises(InputError, match="did not make"):
        run_demo(stages)
    assert (stages.out / "run" / "last.pt").read_bytes() == b"precious"


def test_a_complete_training_is_repeated_if_its_state_or_its_stamp_is_gone(stages):
    run_demo(stages)
    (stages.out / "run" / "last.pt").unlink()
    (stages.out / "run" / "old").touch()
    run_demo(stages)
    assert len(stages.trained) == 2 and "--resume" not in stages.trained[1]
    assert not (stages.out / "run" / "old").exists(), "the old training is removed"
    (stages.out / "training.json").unlink()
    with pytest.raises(InputError, match="did not make"):
        run_demo(stages)
    for path in (stages.out / "run" / "attention").iterdir():
        path.unlink()
    (stages.out / "run" / "attention").rmdir()
    for path in (stages.out / "run").iterdir():
        path.unlink()
    run_demo(stages)  # an empty folder may be used
    assert len(stages.trained) == 3


def test_the_stamp_of_a_training_holds_its_settings_and_whether_it_is_complete(stages):
    stages.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        run_demo(stages, "--training.epochs", "2")
    stamp = json.loads((stages.out / "training.json").read_text())
    assert stamp["complete"] is False and stamp["settings"].keys() == {"config", "options", "corpus"}
    assert stamp["settings"]["options"] == ["--training.epochs", "2"]
    assert stamp["settings"]["config"]["training"]["epochs"] == load_config("tiny").training.epochs
    assert stamp["settings"]["corpus"] == spoken.settings(train=3, dev=1, test=4, seed=1)
    stages.interrupt = False
    run_demo(stages, "--training.epochs", "2")
    assert json.loads((stages.out / "training.json").read_text()) == stamp | {"complete": True}


def test_fresh_starts_an_interrupted_training_over(stages):
    stages.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        run_demo(stages)
    stages.interrupt = False
    run_demo(stages, "--fresh")
    assert "--resume" not in stages.trained[1]


def test_options_have_their_defaults(capsys):
    options, rest = demo.parse(["--training.epochs", "3"])
    assert (options.out, options.beam, options.fresh, rest) == (Path("runs/demo"), 8, False, ["--training.epochs", "3"])
    options, _ = demo.parse(["--beam", "3", "--fresh", "--train", "7", "--seed", "2"])
    assert (options.beam, options.fresh, options.train, options.seed) == (3, True, 7, 2)
    with pytest.raises(SystemExit):
        demo.parse(["--help"])
    assert "beam width; 1 is greedy (default: 8)" in " ".join(capsys.readouterr().out.split())
    for argv in (["--fres"], ["--training.epochs", "x"], ["--beam", "x"]):
        with pytest.raises(SystemExit):
            demo.parse(argv)


def test_the_setting_of_the_beam_is_that_of_the_decoding():
    for argv in (["--decoding.beam", "3"], ["--decoding.beam=3", "--beam", "3"]):
        assert demo.parse(argv)[0].beam == 3
    with pytest.raises(InputError, match=r"^--beam 8 and --decoding.beam 3 are different; give one of them$"):
        demo.parse(["--beam", "8", "--decoding.beam", "3"])


def test_the_stages_run_in_order_with_their_inputs(tmp_path, monkeypatch, capsys):
    calls = []
    for name, result in (("make_corpus", "archive"), ("train", None), ("decode", "printed"),
                         ("summarise", ("result", "rows")), ("show", None)):  # fmt: skip

        def stage(*args, name=name, result=result, **options):
            calls.append((name, *args, options))
            return result

        monkeypatch.setattr(demo, name, stage)
    out, sizes = tmp_path / "a" / "b", {"train": 3, "dev": 2, "test": 1, "seed": 4}
    argv = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    for more, fresh in (((), False), (("--fresh",), True)):
        calls.clear()
        demo.main(["--out", str(out), *argv, "--beam", "3", "--training.epochs", "5", *more])
        assert out.is_dir() and calls == [
            ("make_corpus", out / "data", sizes, {"fresh": fresh}),
            ("train", out, "archive", sizes, ["--training.epochs", "5"], {"fresh": fresh}),
            ("decode", out, "archive", 3, None, {}),
            ("summarise", out, "printed", {}),
            ("show", out, "result", "rows", {}),
        ]
        lines = capsys.readouterr().out.splitlines()
        assert lines[1::3] == ["[1/4] synthesising the corpus", "[2/4] training, preset tiny",
                               "[3/4] decoding test-clean, beam 3", "[4/4] scoring and reporting"]  # fmt: skip


def test_a_corpus_is_kept_or_made(tmp_path, monkeypatch, capsys):
    sizes, made = {"train": 3, "dev": 2, "test": 1, "seed": 4}, []
    monkeypatch.setattr(spoken, "generate", lambda root, **options: made.append((root, options)) or "new")
    for current, fresh, actual in (
        (True, False, tmp_path / spoken.ARCHIVE),
        (True, True, "new"),
        (False, False, "new"),
    ):
        monkeypatch.setattr(spoken, "is_current", lambda root, current=current, **options: current and options == sizes)
        assert demo.make_corpus(tmp_path, sizes, fresh=fresh) == actual
        kept = "was made with the same settings and is kept" in capsys.readouterr().out
        assert kept == (actual != "new")
    assert made == [(tmp_path, sizes)] * 2


def test_a_stage_prints_its_duration(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(demo.time, "perf_counter", lambda: now[0])
    with demo.stage(2, "training"):
        now[0] = 107.4
        print("inside")
    assert capsys.readouterr().out == "\n[2/4] training\ninside\n[2/4] took 7 s\n"


@pytest.mark.parametrize(("count", "shown"), [(3, [0, 1, 2]), (5, [0, 1, 2, 3, 4]), (12, [0, 2, 4, 6, 8])])
def test_the_end_shows_scores_five_examples_and_the_paths_of_results(tmp_path, capsys, count, shown):
    rows = [(f"u-{i:02}", f"SAID {i}", f"HEARD {i}") for i in range(count)]
    result = {"utterances": count, "cer": 12.345, "wer": 23.456, "ld": 3.456, "rtfx": 45.6}
    demo.show(tmp_path, result, rows)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "",
        f"test-clean, {count} utterances in unseen voices: CER 12.35%, WER 23.46%, LD 3.46; "
        "decoded 46 times faster than real time",
        "",
    ]
    examples = [line for i in shown for line in (f"u-{i:02}  reference   SAID {i}", f"      hypothesis  HEARD {i}")]
    names = {"report": "report.html", "scores": "result.json", "submission": "submission.csv", "training": "run",
             "corpus": "data"}  # fmt: skip
    assert lines[3:] == [*examples, "", *(f"{what:<12}{tmp_path / name}" for what, name in names.items())]


def test_the_output_of_the_decoder_is_printed_immediately_and_returned():
    through = io.StringIO()
    flushed = []
    through.flush = lambda: flushed.append(through.getvalue())
    tee = demo.Tee(through)
    assert print("a", file=tee, flush=True) is None and tee.write("bc") == 2
    assert tee.getvalue() == through.getvalue() == "a\nbc" and flushed == ["a\n"]


def test_a_missing_or_damaged_stamp_is_ignored(tmp_path):
    assert demo.read_json(tmp_path / "x.json") is None
    for content in (b"", b"{", b"\xff"):
        (tmp_path / "x.json").write_bytes(content)
        assert demo.read_json(tmp_path / "x.json") is None
    demo.write_json(tmp_path / "x.json", {"a": ["é"]})
    assert demo.read_json(tmp_path / "x.json") == {"a": ["é"]}


def test_a_submission_that_does_not_match_is_refused(tmp_path):
    path = tmp_path / "submission.csv"
    path.write_text("index,label\n0,A\n")
    truth = {"a": ("A", 1.0), "b": ("B", 1.0)}
    with pytest.raises(InputError, match="do not match the 2 test utterances"):
        demo.read_submission(path, truth)
    path.write_text("index,label\n0,X\n1,Y\n")
    assert demo.read_submission(path, truth) == [("a", "A", "X"), ("b", "B", "Y")]
    path.write_text("id,label\na,X\nb,Y\n")  # as in editions with names
    unsorted = dict(reversed(truth.items()))
    assert demo.read_submission(path, unsorted) == [("a", "A", "X"), ("b", "B", "Y")]
    path.write_bytes(b'id,label\na,"X\r\nX"\nb,Y\n')
    assert demo.read_submission(path, truth)[0] == ("a", "A", "X\r\nX")


def test_out_must_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        demo.main(["--out", str(tmp_path / "file")])


def test_a_stray_argument_is_refused(capsys):
    with pytest.raises(SystemExit):
        demo.main(["runs/demo"])
    assert "'runs/demo' is not an option or the value of one" in capsys.readouterr().err
