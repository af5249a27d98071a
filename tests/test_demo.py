"""The demo's stages, with training and decoding replaced by quick ones."""

import csv
import json

import numpy as np
import pytest

from las_fast import decode, demo, train
from las_fast.data import spoken
from las_fast.errors import InputError

SIZES = ["--train", "3", "--dev", "1", "--test", "4"]


class Stages:
    """Stands in for train.main and decode.main, and remembers how they were called."""

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
        texts[0] = texts[0][1:]  # one character is missed
        with open(options["--out"], "w", newline="") as file:
            csv.writer(file).writerows([("index", "label"), *enumerate(texts)])
        print("data: something")
        print(json.dumps({"utterances": 4, "seconds": 0.5, "audio_seconds": 8.0, "rtfx": 16.0}))


@pytest.fixture
def stages(tmp_path, monkeypatch):
    pytest.importorskip("espeakng_loader", reason="eSpeak NG is not installed")
    stages = Stages(tmp_path / "demo")
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
    assert result["cer"] == pytest.approx(100 / characters, abs=1e-3)
    assert (result["seconds"], result["audio_seconds"], result["rtfx"]) == (0.5, 8.0, 16.0)
    assert "3 of 4 have no error" in (out / "report.html").read_text()
    printed = capsys.readouterr().out
    for wanted in ("[1/4]", "[4/4] took", "said", "heard", str(out / "report.html"), "CER", "data: something"):
        assert wanted in printed
    assert stages.decoded[0][-2:] == ["--beam", "8"]
    assert "test-clean" in stages.decoded[0]


def test_a_second_run_keeps_corpus_and_training(stages, capsys):
    run_demo(stages)
    made = (stages.out / "data" / "corpus.json").stat().st_mtime_ns
    run_demo(stages)
    assert len(stages.trained) == 1 and len(stages.decoded) == 2
    assert (stages.out / "data" / "corpus.json").stat().st_mtime_ns == made
    assert capsys.readouterr().out.count("kept") == 2


def test_other_sizes_make_corpus_and_training_again(stages):
    run_demo(stages)
    run_demo(stages, "--train", "4")
    assert len(stages.trained) == 2
    assert "--resume" not in stages.trained[1]
    assert spoken.is_current(stages.out / "data", train=4, dev=1, test=4, seed=1)


def test_other_settings_train_again_and_are_handed_on(stages):
    run_demo(stages)
    run_demo(stages, "--training.epochs", "2")
    assert stages.trained[1][-2:] == ["--training.epochs", "2"]


def test_an_interrupted_training_is_resumed(stages, capsys):
    stages.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        run_demo(stages)
    assert "goes on from here" in capsys.readouterr().err
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


def test_a_training_of_someone_else_is_left_alone(stages):
    (stages.out / "run").mkdir(parents=True)
    (stages.out / "run" / "last.pt").write_bytes(b"precious")
    with pytest.raises(InputError, match="did not make"):
        run_demo(stages)
    assert (stages.out / "run" / "last.pt").read_bytes() == b"precious"


def test_a_submission_that_does_not_match_is_refused(tmp_path):
    path = tmp_path / "submission.csv"
    path.write_text("index,label\n0,A\n")
    truth = {"a": ("A", 1.0), "b": ("B", 1.0)}
    with pytest.raises(InputError, match="do not match the 2 test utterances"):
        demo.read_submission(path, truth)
    path.write_text("index,label\n0,X\n1,Y\n")
    assert demo.read_submission(path, truth) == [("a", "A", "X"), ("b", "B", "Y")]


def test_out_must_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        demo.main(["--out", str(tmp_path / "file")])


def test_a_stray_word_is_refused(capsys):
    with pytest.raises(SystemExit):
        demo.main(["runs/demo"])
    assert "'runs/demo' belongs to no option" in capsys.readouterr().err
