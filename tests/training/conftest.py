"""Fixtures of the tests of a training."""

import pytest
from tiny_checkpoints import make_trainer, small
from tiny_corpora import make_archive


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return make_archive(tmp_path_factory.mktemp("trainer"), "F23", utterances=5)


@pytest.fixture
def trainer(archive, tmp_path):
    """A new trainer: three batches per epoch, two epochs."""
    return make_trainer(archive, tmp_path, small())
