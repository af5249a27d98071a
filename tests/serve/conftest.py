"""An untrained model, a service with it, and recordings."""

from __future__ import annotations

import pytest
from recordings import encoded
from tiny_checkpoints import make_checkpoint
from tiny_corpora import make_speech

import las_fast
from serve.services import running


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return las_fast.load(make_checkpoint(tmp_path_factory.mktemp("serve"), 20, mel_bins=23), device="cpu")


@pytest.fixture(scope="module")
def service(model):
    with running(model, nbest=2) as one:
        yield one


@pytest.fixture(scope="session")
def wav():
    """A function that returns a WAV file of synthetic speech."""
    return lambda seconds=0.6, seed=0: encoded(make_speech(seconds, seed=seed), format="WAV")
