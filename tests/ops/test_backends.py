import warnings

import pytest
import torch

from las_fast.ops import __main__ as command
from las_fast.ops import backends, beam_backtrack, masked_attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TABLE = [(op, backend) for op in backends.IMPLEMENTED for backend in backends.BACKENDS]


@pytest.fixture
def not_built(monkeypatch):
    monkeypatch.setattr(backends, "EXTENSION_PROBLEM", f"the extension is not built. {backends.BUILD}")
    monkeypatch.setattr(backends, "_said", set())


def test_without_the_extension_the_reference_serves_and_says_so_once(not_built):
    tokens = torch.zeros(2, 1, 1, dtype=torch.int64)
    with pytest.warns(RuntimeWarning, match="not built. Run: python setup.py build_ext") as said:
        beam_backtrack(tokens, tokens, eos=2)
        beam_backtrack(tokens, tokens, eos=2)
    assert len(said) == 1


def test_an_op_without_a_faster_path_says_nothing(not_built):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose("masked_attention", "auto", CPU) == "reference"


def test_a_named_backend_that_is_not_built_raises_with_the_remedy(not_built):
    with pytest.raises(RuntimeError, match='backend "cpp" is not available: .* Run: python setup.py build_ext'):
        backends.choose("beam_backtrack", "cpp", CPU)


def test_a_named_backend_that_does_not_exist_yet_raises():
    with pytest.raises(RuntimeError, match="this version has no Triton masked_attention. Use backend='auto'"):
        masked_attention(*[torch.zeros(1, 1, 1)] * 3, torch.ones(1, dtype=torch.int64), backend="triton")


def test_a_misspelt_backend_lists_those_there_are():
    with pytest.raises(ValueError, match="one of auto, reference, cpp, triton; got 'c\\+\\+'"):
        backends.choose("beam_topk", "c++", CPU)


def test_a_backend_refuses_tensors_of_another_device(monkeypatch):
    monkeypatch.setattr(backends, "EXTENSION_PROBLEM", None)
    with pytest.raises(RuntimeError, match='"cpp" takes cpu tensors; got cuda tensors'):
        backends.choose("beam_backtrack", "cpp", CUDA)


def test_auto_prefers_triton_on_cuda_and_cpp_on_a_cpu(monkeypatch):
    monkeypatch.setattr(backends, "EXTENSION_PROBLEM", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(backends.IMPLEMENTED, "beam_topk", ("reference", "cpp", "triton"))
    assert backends.choose("beam_topk", "auto", CUDA) == "triton"
    assert backends.choose("beam_topk", "auto", CPU) == "cpp"
    assert backends.choose("beam_backtrack", "auto", CUDA) == "reference"


def test_triton_without_a_gpu_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(backends.IMPLEMENTED, "beam_topk", ("reference", "triton"))
    assert backends.unavailable("beam_topk", "triton").startswith("there is no CUDA device here")


def test_a_broken_extension_is_explained_not_hidden(monkeypatch):
    def broken(name):
        raise ImportError("_C.abi3.so: undefined symbol: x\nmore")

    monkeypatch.setattr(backends.importlib, "import_module", broken)
    assert backends._load_extension().startswith("the extension does not load (_C.abi3.so: undefined symbol: x). Run:")


@pytest.mark.parametrize(("op", "backend"), TABLE)
def test_the_table_has_a_line_for_every_op_and_backend(op, backend, capsys):
    command.main([])
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.split()[:2] == [op, backend])
    reason = backends.unavailable(op, backend)
    assert reason in line if reason else "yes" in line
