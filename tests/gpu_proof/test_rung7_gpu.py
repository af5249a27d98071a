"""Rung 7 on a GPU if there is one: every case, whole searches by steps and as CUDA graphs, and the training path."""

import os
from dataclasses import replace

import pytest
import torch
from an4_small import CHECKPOINT

from benchmarks.device.checks import CHECKS
from benchmarks.device.timing import exact_float32
from gpu_proof.cases import CASES
from gpu_proof.interpreter import poisoned
from las_fast.checkpoint import load_model
from las_fast.search.beam import beam_search

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)


@pytest.fixture(autouse=True)
def working_device():
    """End the process after a test that made the device unusable; pytest-xdist starts another for the other tests."""
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        raise


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_on_the_gpu_agree_with_the_reference(case):
    with poisoned():
        case.run("cuda", approximate=True)


@pytest.fixture(scope="module")
def encoded():
    """A trained model, and its memory for 70 utterances of noise of different lengths."""
    model = load_model(CHECKPOINT, torch.device("cuda")).model
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 600, (70,), generator=generator)
    features = torch.randn(70, int(lengths.max()), model.input_size, generator=generator)
    with torch.inference_mode():
        return model, model.listen(features.cuda(), lengths.cuda())


@pytest.fixture
def settings():
    return replace(load_model(CHECKPOINT).config.decoding, beam=8)


def assert_same(actual, expected):
    for x, y in zip(sum(actual, []), sum(expected, []), strict=True):
        assert x.text_tokens == y.text_tokens
        assert x.score == pytest.approx(y.score, abs=1e-3)


def test_a_search_by_cuda_graph_equals_one_launched_step_by_step(encoded, settings):
    eager = beam_search(*encoded, settings, nbest=8, backend="triton", capture=False)
    for _ in range(2):  # the first captures the graph, the second replays it
        assert_same(beam_search(*encoded, settings, nbest=8, backend="triton", capture=True), eager)


def test_a_search_on_triton_equals_one_on_the_reference(encoded, settings):
    actual = beam_search(*encoded, settings, nbest=8, backend="triton")
    assert_same(actual, beam_search(*encoded, settings, nbest=8, backend="reference"))


def test_a_search_synchronises_only_to_read_the_flag_of_a_chunk(encoded, settings):
    """torch raises at every synchronisation except reading the flag after an event."""
    model, memory = encoded
    beam_search(model, memory, settings, backend="triton", capture=False)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        from las_fast.search import beam, steps

        search = steps.Search(model, settings, None, "triton")
        with torch.inference_mode():
            limits = beam.length_limits(memory.lengths * model.time_reduction, settings)
            inputs, beams = steps.begin(search, memory, limits)
            for _ in range(3):
                beams, _ = steps.advance(search, inputs, beams)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", CHECKS)
def test_the_training_path_and_every_search_match_the_cpu(name):
    with exact_float32():
        for comparison in CHECKS[name]("cuda", False):
            assert comparison.error <= comparison.tolerance, comparison
