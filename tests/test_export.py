"""Exported checkpoints: half the size, the same answers, settings of their own."""

import pytest
import torch
from checkpoints import make_checkpoint

from las_fast import checkpoint, export
from las_fast.errors import InputError
from las_fast.lm import beside


def exported(path, *words):
    out = path.parent / "small.safetensors"
    export.main(["--checkpoint", str(path), "--out", str(out), *words])
    return out


def test_an_exported_model_is_half_as_large_and_computes_in_float32_with_weights_rounded_to_half(tmp_path):
    path = make_checkpoint(tmp_path, info={"epoch": 3})
    out = exported(path)
    given, found = checkpoint.load_model(path), checkpoint.load_model(out)
    assert out.stat().st_size < 0.6 * path.stat().st_size
    assert found.info == {"epoch": 3} and found.config == given.config
    theirs = given.model.state_dict()
    for name, value in found.model.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, theirs[name], rtol=2**-11, atol=2**-24)


def test_decoding_settings_become_the_files_own(tmp_path):
    out = exported(make_checkpoint(tmp_path), "--decoding.beam", "3", "--decoding.length-penalty", "0.5")
    decoding = checkpoint.load_model(out).config.decoding
    assert (decoding.beam, decoding.length_penalty) == (3, 0.5)


def test_a_language_model_that_the_settings_use_goes_with_the_file(tmp_path):
    path = make_checkpoint(tmp_path)
    beside(path).write_bytes(b"counts")
    assert not beside(exported(path)).exists()
    assert beside(exported(path, "--decoding.ngram-weight", "0.2")).read_bytes() == b"counts"


def test_each_file_written_is_named_with_its_size(tmp_path, capsys):
    path = make_checkpoint(tmp_path)
    beside(path).write_bytes(b"x" * 2_340_000)
    out = exported(path, "--decoding.ngram-weight", "0.2")
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"written     {out} ({out.stat().st_size / 1e6:.1f} MB)", f"written     {beside(out)} (2.3 MB)"]


def test_a_checkpoint_may_be_exported_onto_itself_with_its_language_model(tmp_path):
    path = make_checkpoint(tmp_path)
    beside(path).write_bytes(b"counts")
    (tmp_path / "link").symlink_to(tmp_path)
    out = tmp_path / "link" / path.name
    loaded = checkpoint.load_model(path)
    settings = export.Settings(loaded.config.decoding.__class__(ngram_weight=0.2))
    assert export.export(loaded, settings, out) == [out]
    assert beside(path).read_bytes() == b"counts"


def test_settings_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(InputError, match="decoding.beam must be at least 1"):
        exported(make_checkpoint(tmp_path), "--decoding.beam", "0")


def test_weights_beyond_half_precision_are_refused(tmp_path):
    path = make_checkpoint(tmp_path)
    loaded = checkpoint.load_model(path)
    with torch.no_grad():
        loaded.model.speller.bias[3] = 1e5
    with pytest.raises(InputError, match="speller.bias holds 100000, more than float16 can"):
        export.export(loaded, export.Settings(loaded.config.decoding), tmp_path / "small.safetensors")
    assert not (tmp_path / "small.safetensors").exists()
