"""Exported checkpoints: half the size, the same results, their own settings."""

import re

import pytest
import torch
from tiny_checkpoints import make_checkpoint

from las_fast import checkpoint, export, lm
from las_fast.errors import InputError
from las_fast.search.confidence import calibration_path_for, load_calibration
from las_fast.search.ngram import lm_path_for, save_lm


def export_model(path, *argv):
    out = path.parent / "small.safetensors"
    export.main(["--checkpoint", str(path), "--out", str(out), *argv])
    return out


def test_an_exported_model_is_half_as_large_and_computes_in_float32_with_weights_rounded_to_half(tmp_path):
    path = make_checkpoint(tmp_path, info={"epoch": 3})
    out = export_model(path)
    original, exported = checkpoint.load_model(path), checkpoint.load_model(out)
    assert out.stat().st_size < 0.6 * path.stat().st_size
    assert exported.info == {"epoch": 3} and exported.config == original.config
    expected = original.model.state_dict()
    for name, value in exported.model.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name], rtol=2**-11, atol=2**-24)


def test_decoding_settings_become_the_defaults_of_the_file(tmp_path):
    out = export_model(make_checkpoint(tmp_path), "--decoding.beam", "3", "--decoding.length-penalty", "0.5")
    decoding = checkpoint.load_model(out).config.decoding
    assert (decoding.beam, decoding.length_penalty) == (3, 0.5)


def test_a_language_model_that_the_settings_use_goes_with_the_file(tmp_path):
    path = make_checkpoint(tmp_path)
    lm_path_for(path).write_bytes(b"counts")
    assert not lm_path_for(export_model(path)).exists()
    assert lm_path_for(export_model(path, "--decoding.ngram-weight", "0.2")).read_bytes() == b"counts"


def test_a_language_model_of_another_model_beside_the_output_is_refused(tmp_path):
    path = make_checkpoint(tmp_path)
    lm_path_for(tmp_path / "small.safetensors").write_bytes(b"counts")
    with pytest.raises(InputError, match=r"small.lm.safetensors is not of this checkpoint, but would be used"):
        export_model(path, "--decoding.ngram-weight", "0.2")
    assert not (tmp_path / "small.safetensors").exists()


def test_a_weight_without_a_language_model_is_refused(tmp_path):
    """Otherwise no command could decode with the file."""
    path = make_checkpoint(tmp_path)
    missing = re.escape(
        f"ngram_weight is 0.2, but there is no language model {lm_path_for(path)}; copy it there, or add"
    )
    with pytest.raises(InputError, match=missing):
        export_model(path, "--decoding.ngram-weight", "0.2")
    assert not (tmp_path / "small.safetensors").exists()


def test_each_file_written_is_named_with_its_size(tmp_path, capsys):
    path = make_checkpoint(tmp_path)
    lm_path_for(path).write_bytes(b"x" * 2_340_000)
    out = export_model(path, "--decoding.ngram-weight", "0.2")
    lines = capsys.readouterr().out.splitlines()
    sizes = {out: f"{out.stat().st_size / 1e6:.1f}", lm_path_for(out): "2.3"}
    assert lines == [f"written     {file} ({size} MB)" for file, size in sizes.items()]


def test_a_checkpoint_may_be_exported_onto_itself_with_its_language_model(tmp_path):
    path = make_checkpoint(tmp_path)
    lm_path_for(path).write_bytes(b"counts")
    (tmp_path / "link").symlink_to(tmp_path)
    out = tmp_path / "link" / path.name
    loaded = checkpoint.load_model(path)
    settings = export.DecodingSettings(loaded.config.decoding.__class__(ngram_weight=0.2))
    assert export.export(loaded, settings, out) == [out]
    assert lm_path_for(path).read_bytes() == b"counts"


def test_inconsistent_settings_are_refused(tmp_path):
    with pytest.raises(InputError, match="decoding.beam must be at least 1"):
        export_model(make_checkpoint(tmp_path), "--decoding.beam", "0")


def test_weights_beyond_half_precision_are_refused(tmp_path):
    path = make_checkpoint(tmp_path)
    loaded = checkpoint.load_model(path)
    with torch.no_grad():
        loaded.model.speller.bias[3] = 1e5
    with pytest.raises(InputError, match="speller.bias contains 100000, which float16 cannot represent"):
        export.export(loaded, export.DecodingSettings(loaded.config.decoding), tmp_path / "small.safetensors")
    assert not (tmp_path / "small.safetensors").exists()


@pytest.mark.parametrize("missing", ["--checkpoint", "--out"])
def test_a_checkpoint_and_a_file_must_be_given(missing, capsys):
    required = {"--checkpoint": "x", "--out": "y.safetensors"}
    del required[missing]
    with pytest.raises(SystemExit):
        export.main([word for pair in required.items() for word in pair])
    assert f"{missing} must be given" in capsys.readouterr().err


def test_a_name_with_a_trailing_slash_is_refused(capsys):
    with pytest.raises(SystemExit):
        export.main(["--checkpoint", "x", "--out", "model/"])
    assert "model/ is a folder; give the name of a file to write" in capsys.readouterr().err


def test_help_lists_the_settings_of_decoding_and_no_others(capsys):
    with pytest.raises(SystemExit) as end:
        export.main(["--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0 and "--decoding.beam" in out and "--training.epochs" not in out
    assert out.count("-h, --help") == 1  # options and settings together


def test_a_weight_that_is_not_a_number_is_refused(tmp_path):
    loaded = checkpoint.load_model(make_checkpoint(tmp_path))
    with torch.no_grad():
        loaded.model.speller.bias[3] = torch.inf  # one of many weights
    with pytest.raises(InputError, match="speller.bias contains inf, which float16 cannot represent"):
        export.export(loaded, export.DecodingSettings(loaded.config.decoding), tmp_path / "small.safetensors")


def test_settings_given_to_export_are_checked(tmp_path):
    loaded = checkpoint.load_model(make_checkpoint(tmp_path))
    settings = export.DecodingSettings(loaded.config.decoding.__class__(ctc_weight=0.5))
    with pytest.raises(InputError, match="decoding.ctc_weight needs a model with a CTC head"):
        export.export(loaded, settings, tmp_path / "small.safetensors")
    assert not (tmp_path / "small.safetensors").exists()


def test_an_earlier_export_is_replaced_with_its_language_model(tmp_path):
    path = make_checkpoint(tmp_path)
    save_lm(lm_path_for(path), lm.train(["AB"], order=1, characters="AB"))
    for text in ("AB", "ABBA"):
        save_lm(lm_path_for(path), lm.train([text], order=1, characters="AB"))
        out = export_model(path, "--decoding.ngram-weight", "0.2")
        assert lm_path_for(out).read_bytes() == lm_path_for(path).read_bytes()


def test_names_of_training_weights_may_be_used_elsewhere(tmp_path):
    path = make_checkpoint(tmp_path)
    for name in ("best.safetensors", "averaged.safetensors"):
        export.main(["--checkpoint", str(path), "--out", str(tmp_path / "new" / name)])
    (tmp_path / "last.pt").touch()
    assert export_model(path).exists()  # another name in the folder of a training


@pytest.mark.parametrize("name", ["best.safetensors", "averaged.safetensors"])
def test_weights_of_a_training_are_not_replaced(tmp_path, name):
    path, run = make_checkpoint(tmp_path), tmp_path / "run"
    run.mkdir()
    (run / "last.pt").touch()
    with pytest.raises(InputError, match=f"{name} belongs to the training in .*run; give another name"):
        export.main(["--checkpoint", str(path), "--out", str(run / name)])


def test_the_checkpoint_itself_is_not_replaced(tmp_path):
    path = make_checkpoint(tmp_path)
    before = path.read_bytes()
    with pytest.raises(InputError, match=f"{path.name} is an input of this command"):
        export.main(["--checkpoint", str(path), "--out", str(path)])
    assert path.read_bytes() == before


def test_a_file_that_is_no_model_is_not_replaced(tmp_path):
    path, out = make_checkpoint(tmp_path), tmp_path / "small.safetensors"
    save_lm(out, lm.train(["AB"], order=1, characters="AB"))
    before = out.read_bytes()
    with pytest.raises(InputError, match="small.safetensors exists and is not a model; give another name"):
        export_model(path)
    assert out.read_bytes() == before


@pytest.mark.parametrize("name", ["small.pt", "small.csv"])
def test_an_exported_model_has_the_suffix_safetensors(tmp_path, name):
    with pytest.raises(InputError, match=r"the output is a model; give a name that ends in .safetensors"):
        export.main(["--checkpoint", str(make_checkpoint(tmp_path)), "--out", str(tmp_path / name)])


def test_the_checkpoints_language_model_is_not_overwritten(tmp_path):
    path = make_checkpoint(tmp_path)
    save_lm(lm_path_for(path), lm.train(["AB"], order=1, characters="AB"))
    before, alias = lm_path_for(path).read_bytes(), tmp_path / "alias.lm.safetensors"
    alias.symlink_to(lm_path_for(path))
    with pytest.raises(InputError, match="alias.lm.safetensors is an input of this command"):
        export.main(["--checkpoint", str(path), "--out", str(tmp_path / "alias.safetensors")])
    assert lm_path_for(path).read_bytes() == before


def test_a_language_model_of_the_user_stays_where_the_checkpoint_has_none(tmp_path):
    path = make_checkpoint(tmp_path)
    lm_path_for(tmp_path / "small.safetensors").write_text("mine")
    assert lm_path_for(export_model(path)).read_text() == "mine"


def test_the_calibration_of_confidences_is_copied_and_replaces_only_another(tmp_path):
    path, other = make_checkpoint(tmp_path), tmp_path / "small.words.json"
    calibration = load_calibration(path)
    calibration.save(calibration_path_for(path))
    out = export_model(path)
    assert load_calibration(out) == calibration and other.is_file()
    export_model(path)
    calibration_path_for(path).unlink()
    with pytest.raises(
        InputError, match=f"small.words.json is not of this checkpoint.*move it to .*{path.stem}.words.json"
    ):
        export_model(path)
    calibration.save(calibration_path_for(path))
    other.write_text("notes")
    with pytest.raises(InputError, match="small.words.json"):
        export_model(path)
    assert other.read_text() == "notes"


def test_a_damaged_calibration_is_not_copied(tmp_path):
    path = make_checkpoint(tmp_path)
    calibration_path_for(path).write_text("{}")
    with pytest.raises(InputError, match=f"{path.stem}.words.json is not a calibration"):
        export_model(path)
    assert not (tmp_path / "small.safetensors").exists() and not (tmp_path / "small.words.json").exists()
