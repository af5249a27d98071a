import importlib
import os
import re
import sys
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_bilstm
import test_ctc_loss
import test_masked_attention
import test_speller_unroll
import torch
from calls import lanes, tiles
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from las_fast.doctor import AVX512, cpu_flags
from las_fast.ops import __main__ as command
from las_fast.ops import backends, beam_gather, bilstm, ctc_loss, masked_attention, speller_unroll
from las_fast.ops.speller import SpellerWeights

LENGTHS = torch.tensor([7, 3, 1])
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def fresh():
    """Nothing is remembered from or for other tests."""
    backends._unmet_by_triton.cache_clear()
    yield
    backends._unmet_by_triton.cache_clear()


@pytest.fixture
def not_built(monkeypatch):
    monkeypatch.setattr(backends, "EXTENSION_PROBLEM", f"the extension is not built. {backends.BUILD_ADVICE}")
    monkeypatch.setattr(backends, "_warned", set())


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(backends, "EXTENSION_PROBLEM", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (8, 0))
    monkeypatch.setattr(backends, "missing_for_triton", lambda: None)


def test_without_the_extension_the_reference_runs_and_warns_once(not_built):
    states, parents = [torch.ones(2, 1, 4)], torch.zeros(2, 1, dtype=torch.int64)
    with pytest.warns(RuntimeWarning, match="not built. Run: python setup.py build_ext") as caught:
        beam_gather(states, parents)
        (gathered,) = beam_gather(states, parents)
    assert len(caught) == 1 and torch.equal(gathered, states[0])


def test_a_named_reference_gives_no_warning(not_built):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose("masked_attention", "reference", CPU) == "reference"


def test_a_named_backend_that_is_not_built_raises_with_the_remedy(not_built):
    with pytest.raises(RuntimeError, match='backend "cpp" is not available: .* Run: python setup.py build_ext'):
        backends.choose("beam_backtrack", "cpp", CPU)


def test_a_named_backend_that_an_op_lacks_raises(monkeypatch):
    monkeypatch.setitem(backends.IMPLEMENTED, "beam_gather", {"reference": None})
    with pytest.raises(RuntimeError, match="this version has no Triton beam_gather. Use backend='auto'"):
        backends.choose("beam_gather", "triton", CUDA)


def test_an_unknown_backend_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="one of auto, reference, fused, cpp, triton; got 'c\\+\\+'"):
        backends.choose("beam_topk", "c++", CPU)


def test_a_backend_refuses_tensors_of_another_device(gpu):
    with pytest.raises(RuntimeError, match='"cpp" takes cpu tensors; got cuda tensors'):
        backends.choose("beam_backtrack", "cpp", CUDA)
    with pytest.raises(RuntimeError, match='"triton" takes cuda tensors; got cpu tensors'):
        backends.choose("beam_backtrack", "triton", CPU)


def test_a_named_backend_refuses_a_dtype_that_auto_leaves_to_the_reference(gpu):
    with pytest.raises(RuntimeError, match='"cpp" takes torch.float32 or torch.bfloat16; got torch.float16'):
        backends.choose("masked_attention", "cpp", CPU, torch.float16)
    assert backends.choose("masked_attention", "auto", CPU, torch.float16) == "reference"
    assert backends.choose("masked_attention", "auto", CUDA, torch.float64) == "reference"


@pytest.mark.parametrize("op", backends.IMPLEMENTED)
def test_auto_chooses_triton_or_fused_on_cuda_and_cpp_on_a_cpu(gpu, op):
    expected = next(name for name in ("triton", "fused", "reference") if name in backends.IMPLEMENTED[op])
    assert backends.choose(op, "auto", CUDA, torch.float32) == expected
    assert backends.choose(op, "auto", CPU, torch.float32) == "cpp"


def test_each_op_has_the_backends_listed_here():
    """Other tests skip backends that an op lacks, so they would not notice one that is removed by mistake."""
    native, everywhere = ("reference", "cpp"), ("reference", "cpp", "triton")
    assert {op: tuple(has) for op, has in backends.IMPLEMENTED.items()} == {
        "bilstm": native, "ctc_loss": everywhere, "masked_attention": everywhere, "beam_topk": everywhere,
        "beam_gather": everywhere, "ngram_scores": everywhere, "ctc_prefix": everywhere, "beam_backtrack": everywhere,
        "speller_unroll": ("reference", "fused", "cpp", "triton"), "speller_search": native,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("op", "backend", "dtypes"),
    [
        ("bilstm", "cpp", "float32 bfloat16"),
        ("ctc_loss", "cpp", "float32"),
        ("ctc_loss", "triton", "float32"),
        ("masked_attention", "cpp", "float32 bfloat16"),
        ("masked_attention", "triton", "float32 float16 bfloat16"),
        ("beam_topk", "cpp", "float32 float16 bfloat16"),
        ("beam_topk", "triton", "float32 float16 bfloat16"),
        ("ctc_prefix", "cpp", "float32"),
        ("ctc_prefix", "triton", "float32"),
        ("speller_unroll", "cpp", "float32"),
        ("speller_unroll", "triton", "float32"),
        ("speller_search", "cpp", "float32"),
        ("beam_gather", "cpp", "float64 float32 float16 bfloat16"),
    ],
)
def test_a_backend_takes_these_types_and_no_others(op, backend, dtypes):
    every = ("float64", "float32", "float16", "bfloat16")
    assert [x for x in every if backends.supports_dtype(op, backend, getattr(torch, x))] == dtypes.split()
    assert backends.supports_dtype(op, backend, None)


def test_triton_without_a_gpu_is_unavailable(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backends.unavailable("beam_topk", "triton").startswith("there is no CUDA device here")


def test_a_broken_extension_is_explained_not_hidden(monkeypatch):
    def fail(name):
        raise ImportError("_C.abi3.so: undefined symbol: x\nmore")

    monkeypatch.setattr(backends.importlib, "import_module", fail)
    assert backends._load_extension().startswith("the extension does not load (_C.abi3.so: undefined symbol: x). Run:")


def test_an_extension_of_another_version_is_explained(monkeypatch):
    monkeypatch.setitem(backends.IMPLEMENTED, "beam_wish", {"reference": None, "cpp": None})
    monkeypatch.setattr(backends.importlib, "import_module", lambda name: None)
    reason = backends._load_extension()
    assert "it lacks" in reason and "beam_wish" in reason and "). Run: python setup.py build_ext --force" in reason


def test_an_extension_with_another_schema_of_an_op_is_explained(monkeypatch):
    monkeypatch.setattr(backends, "EXTENSION_PROBLEM", None)
    torch.library.define("las_fast::beam_wish_cpp", "(Tensor x, int older) -> Tensor")
    assert not backends._define_cpp("beam_wish", "(Tensor x) -> Tensor")
    assert "another version (it has another beam_wish). Run: " in backends.unavailable("beam_topk", "cpp")


def test_an_op_is_registered_with_the_backends_that_it_has(monkeypatch):
    monkeypatch.setattr(backends, "EXTENSION_PROBLEM", None)
    monkeypatch.setitem(backends.IMPLEMENTED, "hope", {"reference": None, "cpp": None, "triton": None})
    monkeypatch.setitem(backends.IMPLEMENTED, "hope_alone", {"reference": None, "cpp": None})
    schema = "(Tensor x) -> Tensor"

    def fake(x):
        return x.new_empty(2, *x.shape)

    assert backends.register("hope", schema, fake) == ["las_fast::hope_triton", "las_fast::hope_cpp"]
    assert backends.register("hope_back", schema, fake, module="hope")[0] == "las_fast::hope_back_triton"
    assert backends.register("hope_alone", schema, fake) == ["las_fast::hope_alone_cpp"]
    with FakeTensorMode():
        for op in ("hope_triton", "hope_cpp", "hope_back_triton", "hope_alone_cpp"):
            assert getattr(torch.ops.las_fast, op)(torch.empty(3)).shape == (2, 3)
    monkeypatch.setattr(backends, "EXTENSION_PROBLEM", "the extension is not built")
    assert backends.register("hope_late", schema, fake, module="hope") == ["las_fast::hope_late_triton"]


def test_a_triton_op_calls_its_launcher_on_a_cpu_too(monkeypatch):
    """tests/gpu_proof interprets the kernels there."""
    monkeypatch.setitem(backends.IMPLEMENTED, "launched", {"triton": None})
    launcher = SimpleNamespace(launched_back=lambda x: x + 1)
    monkeypatch.setitem(sys.modules, "las_fast.kernels.launched", launcher)
    backends.register("launched_back", "(Tensor x) -> Tensor", torch.empty_like, module="launched")
    assert torch.ops.las_fast.launched_back_triton(torch.zeros(1)).item() == 1


@pytest.mark.parametrize("op", backends.IMPLEMENTED)
def test_the_table_lists_every_op_and_why_it_is_unavailable(op, capsys):
    command.main([])
    lines = capsys.readouterr().out.replace("no [", "no[").splitlines()
    (cells,) = (line.split()[1:] for line in lines if line.split()[:1] == [op])
    for backend, cell in zip(backends.BACKENDS, cells, strict=True):
        if backend not in backends.IMPLEMENTED[op]:
            assert cell == "-"
        elif reason := backends.unavailable(op, backend):
            assert f"{cell.removeprefix('no')} {reason}" in lines
        else:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            assert cell == ("auto" if backend == backends.auto_backend(op, device) else "yes")


def test_the_table_marks_what_is_chosen_on_the_device_here(gpu, monkeypatch):
    monkeypatch.setattr(backends, "_triton_problem", lambda: None)
    for there, expected in ((True, ["yes", "-", "yes", "auto"]), (False, ["yes", "-", "auto", "yes"])):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        (cells,) = (line.split()[1:] for line in command.table().splitlines() if line.startswith("beam_topk "))
        assert cells == expected


def test_the_command_prints_the_devices_and_each_reason_once(monkeypatch, capsys):
    monkeypatch.setattr(backends, "EXTENSION_PROBLEM", "the extension is not built")
    monkeypatch.setattr(backends, "_triton_problem", lambda: "there is no CUDA device here")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    command.main([])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"torch {torch.__version__}, 3 CPU threads, 2 CUDA devices", ""]
    assert lines[-3:] == ["", "[1] the extension is not built", "[2] there is no CUDA device here"]
    assert ["masked_attention", "auto", "-", "no", "[1]", "no", "[2]"] in [line.split() for line in lines]


def test_the_columns_of_the_table_are_aligned():
    lines = command.table().splitlines()
    starts = [lines[0].index(name) for name in backends.BACKENDS]
    assert starts == [18, 29, 40, 51] and lines[0].startswith("op ") and lines == [line.rstrip() for line in lines]
    for line in lines[1 : 1 + len(backends.IMPLEMENTED)]:
        assert all(line[:start].endswith(" ") and line[start] != " " for start in starts)


def test_sizes_beyond_a_backend_go_to_the_reference_or_are_refused(gpu):
    excess = {"triton": "takes at most 3 beams", "cpp": None}
    assert backends.choose("beam_topk", "auto", CUDA, torch.float32, excess) == "reference"
    assert backends.choose("beam_topk", "auto", CPU, torch.float32, excess) == "cpp"
    assert backends.choose("beam_topk", "cpp", CPU, torch.float32, excess) == "cpp"
    with pytest.raises(RuntimeError, match='"triton" takes at most 3 beams. Use backend='):
        backends.choose("beam_topk", "triton", CUDA, torch.float32, excess)


@pytest.mark.parametrize(
    ("cuda_available", "hip", "installed", "message"),
    [
        (False, None, True, "there is no CUDA device here"),
        (True, "6.0", True, "the Triton kernels are for NVIDIA GPUs only"),
        (True, None, False, "triton is not installed"),
        (True, None, True, None),
    ],
)
def test_triton_needs_an_nvidia_gpu_and_its_package(monkeypatch, cuda_available, hip, installed, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda_available)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(backends, "is_installed", lambda name: installed)
    monkeypatch.setattr(backends, "missing_for_triton", lambda: None)
    problem = backends.unavailable("beam_topk", "triton")
    assert problem is None if message is None else problem.startswith(message)


@pytest.fixture
def two_gpus(monkeypatch):
    """Two GPUs, of which Triton supports one, with all else that it needs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(backends, "is_installed", lambda name: True)
    monkeypatch.setattr(backends, "missing_for_triton", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: ((6, 1), (8, 0))[i])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: ("P40", "T4")[i])


@pytest.mark.usefixtures("two_gpus")
def test_triton_needs_a_gpu_of_compute_capability_8(monkeypatch):
    assert backends.unavailable("beam_topk", "triton") is None  # one of them suffices
    backends._unmet_by_triton.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: ((6, 1), (7, 5))[i])
    message = "the Triton kernels need a GPU of compute capability 8.0 or higher, and T4 has 7.5. Use backend='auto'"
    assert backends.unavailable("beam_topk", "triton") == message
    monkeypatch.setattr(backends, "_warned", set())
    with pytest.warns(RuntimeWarning, match="and T4 has 7.5$"):
        assert backends.choose("speller_unroll", "auto", CUDA) == "fused"


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("compiled", [True, False])
def test_triton_needs_a_compiler_unless_it_has_compiled_before(monkeypatch, compiled):
    monkeypatch.setattr(
        backends, "missing_for_triton", lambda: ("there is no C compiler (gcc or clang)", "Install gcc")
    )
    monkeypatch.setattr(backends, "_triton_has_compiled", lambda: compiled)
    expected = "Triton compiles code when a kernel is first launched, but there is no C compiler (gcc or clang). "
    assert backends.unavailable("beam_topk", "triton") == (None if compiled else f"{expected}Install gcc")


def test_torch_compile_asks_for_the_needs_of_triton_without_tracing_the_questions(monkeypatch):
    def capability(number):
        os.stat("/")  # cannot be traced, as the real question cannot
        return 9, 0

    cuda = SimpleNamespace(is_available=lambda: True, device_count=lambda: 1, get_device_capability=capability)
    monkeypatch.setattr(backends, "torch", SimpleNamespace(cuda=cuda, version=SimpleNamespace(hip=None)))
    monkeypatch.setattr(backends, "missing_for_triton", lambda: None)

    def compiled(x):
        return x + (1 if backends.unavailable("beam_topk", "triton") else 2)

    assert torch.compile(compiled, backend="eager", fullgraph=True)(torch.zeros(1)) == 2


def test_without_a_driver_triton_has_not_compiled():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device, with a driver")
    assert not backends._triton_has_compiled()


def test_triton_kernels_refuse_sizes_beyond_their_limits():
    topk, attention = (importlib.import_module(f"las_fast.ops.{name}") for name in ("beam_topk", "masked_attention"))
    assert topk.triton_problem(128, 1000) is None and topk.triton_problem(1, 2**31 - 1) is None
    assert topk.triton_problem(129, 10).startswith(
        "takes at most 128 beams and 2^31 candidates per utterance; got 129 beams"
    )
    assert topk.triton_problem(2, 2**30) is not None and topk.triton_problem(1, 2**31) is not None

    def wide(D, E, dtype=torch.float32, graded=False):
        query, values = torch.zeros(1, 1, D, dtype=dtype, requires_grad=graded), torch.zeros(1, 1, E, dtype=dtype)
        return attention.triton_problem(query, query.detach(), values)

    assert wide(512, 512) is None and wide(256, 256, graded=True) is None
    assert wide(512, 512, torch.bfloat16, graded=True) is None
    for D, E, graded in ((513, 1, False), (1, 513, False), (257, 1, True), (1, 257, True)):
        assert f"takes at most {256 if graded else 512} numbers" in wide(D, E, graded=graded)
        assert wide(D, E, graded=graded).endswith(f"got D={D} and E={E}")
    with torch.no_grad():
        assert wide(512, 512, graded=True) is None


def test_a_kernel_is_launched_on_the_device_of_its_tensors():
    with FakeTensorMode():
        there = torch.empty(2, device="cuda:1")
    assert backends._device_of((None, there, 0.5)) == torch.device("cuda:1")
    assert backends._device_of(([there], None)) == torch.device("cuda:1")
    assert backends._device_of(([], torch.zeros(1))) == CPU


def test_without_triton_a_gpu_uses_the_reference_and_warns_once(monkeypatch):
    monkeypatch.setattr(backends, "_triton_problem", lambda: "triton is not installed. Run: pip install triton")
    monkeypatch.setattr(backends, "_warned", set())
    with pytest.warns(RuntimeWarning, match="Run: pip install triton") as caught:
        assert [backends.choose("beam_topk", "auto", CUDA) for _ in range(2)] == ["reference"] * 2
    assert len(caught) == 1


def test_every_registered_op_is_known_to_the_version_check():
    files = Path(backends.__file__).parent.glob("*.py")
    registered = {name for file in files for name in re.findall(r'backends\.register\(\s*"(\w+)"', file.read_text())}
    assert registered - set(backends.IMPLEMENTED) == set(backends.HELPER_OPS)


def test_every_kernel_of_the_extension_belongs_to_a_registered_op():
    sources = [file.read_text() for file in (Path(__file__).parents[2] / "csrc").glob("*.cpp")]
    kernels = [name for text in sources for name in re.findall(r'm\.impl\("(\w+)_cpp"', text)]
    assert sorted(kernels) == sorted({*backends.IMPLEMENTED, *backends.HELPER_OPS})


def test_limit_lanes_narrows_vectors_until_it_is_undone(cpp):
    limit = torch.ops.las_fast.limit_lanes
    before = limit(8)
    try:
        assert limit(4) in (4, 8) and limit(4) == 4  # 8 unless the processor has fewer
        with pytest.raises(RuntimeError, match="max_lanes must be at least 4; got 3"):
            limit(3)
    finally:
        assert limit(before) == 4


def test_tiles_are_used_where_processor_and_system_have_them(cpp):
    has_tiles, flags = torch.ops.las_fast.has_tiles, cpu_flags()
    assert has_tiles() <= (sys.platform == "linux" and flags >= {"amx_tile", "amx_bf16", "amx_int8"})
    assert has_tiles() >= (torch.cpu._is_amx_tile_supported() and flags >= AVX512)
    with tiles(False):
        assert not has_tiles()
    with lanes(15):
        assert not has_tiles()
    assert torch.ops.las_fast.allow_tiles(True)


def saves_for_backward(op: str, function) -> bool:
    """The last argument of the C++ op: whether it saves tensors for its backward pass."""
    flags = []

    class RecordFlag(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._schema.name == f"las_fast::{op}":
                flags.append(args[-1])
            return func(*args, **(kwargs or {}))

    with RecordFlag():
        function()
    (flag,) = flags
    return flag


def differentiable():
    """Yield (op, function of tensors, tensors that may need a gradient)."""
    x, *weights = test_bilstm.inputs()
    yield "bilstm_cpp", lambda x, *w: bilstm(x, LENGTHS, w[:4], w[4:]), [x, *weights]
    logits, *rest = test_ctc_loss.inputs()
    yield "ctc_loss_cpp", lambda x: ctc_loss(x, *rest), [logits]
    weights, keys, values, *rest = test_speller_unroll.inputs(*test_speller_unroll.SIZES[2])
    flat = list(weights.flat())

    def unroll(keys, values, *flat):
        return speller_unroll(SpellerWeights.from_flat(flat), keys, values, *rest)

    yield "speller_unroll_cpp", unroll, [keys, values, *flat]


def test_tensors_are_saved_only_if_gradients_are_needed(cpp):
    for op, function, tensors in differentiable():
        assert not saves_for_backward(op, partial(function, *tensors))
        for i in range(len(tensors)):
            leaves = [x.detach().requires_grad_() if i == j else x for j, x in enumerate(tensors)]
            assert saves_for_backward(op, partial(function, *leaves))
            with torch.no_grad():
                assert not saves_for_backward(op, partial(function, *leaves))


@pytest.mark.parametrize("index", [0, 1, 2])
def test_each_input_of_attention_can_be_the_only_one_that_needs_a_gradient(cpp, index):
    tensors = test_masked_attention.inputs()
    every = [x.clone().requires_grad_() for x in tensors]
    context, weights = masked_attention(*every, LENGTHS)
    loss = context.square().sum() + weights.square().sum()
    expected = torch.autograd.grad(loss, every)[index]
    alone = [x.clone().requires_grad_(i == index) for i, x in enumerate(tensors)]
    context, weights = masked_attention(*alone, LENGTHS)
    loss = context.square().sum() + weights.square().sum()
    assert torch.equal(torch.autograd.grad(loss, alone[index])[0], expected)
