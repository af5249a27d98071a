import pytest
import torch
from calls import LAYOUTS, call, compile_and_count, ops_called, threads

from las_fast.ops import beam_gather

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.bool]
DTYPES += [torch.complex64, torch.complex128]


def make(B, K, sizes=(5,), dtypes=(torch.float32,), seed=0):
    generator = torch.Generator().manual_seed(seed)
    states = [torch.randint(-100, 100, (B, K, N), generator=generator).to(dtype) for N in sizes for dtype in dtypes]
    return states, torch.randint(0, max(K, 1), (B, K), generator=generator)


@pytest.mark.parametrize(
    ("B", "K", "N"), [(1, 1, 1), (3, 4, 7), (2, 8, 512), (16, 5, 257), (2, 64, 31), (0, 3, 4), (3, 0, 4), (2, 3, 0)]
)
def test_each_hypothesis_becomes_its_parent(backend, B, K, N):
    (state,), parents = make(B, K, [N])
    (gathered,) = call(beam_gather, [state], parents, backend=backend)
    assert gathered.shape == state.shape and gathered.dtype == state.dtype and gathered.is_contiguous()
    for b in range(B):
        for k in range(K):
            assert torch.equal(gathered[b, k], state[b, parents[b, k]])


def test_any_dtype_and_any_number_of_states_of_different_sizes(backend):
    states, parents = make(3, 4, (1, 6, 33), DTYPES)
    actual = call(beam_gather, states, parents, backend=backend)
    assert len(actual) == len(states) == 24
    for state, gathered in zip(states, actual, strict=True):
        expected = torch.stack([state[b, parents[b]] for b in range(3)])
        assert gathered.dtype == state.dtype and torch.equal(gathered, expected)


def test_without_states_there_are_no_results(backend):
    assert call(beam_gather, [], torch.zeros(2, 3, dtype=torch.int64), backend=backend) == ()


def test_states_are_not_modified_and_results_are_new(backend):
    (state,), _ = make(2, 3)
    before, parents = state.clone(), torch.arange(3).expand(2, 3)
    (gathered,) = call(beam_gather, [state], parents, backend=backend)
    gathered += 1
    assert torch.equal(state, before)


@pytest.mark.parametrize("relayout", LAYOUTS.values(), ids=LAYOUTS)
def test_inputs_need_not_be_contiguous(backend, relayout):
    (state,), parents = make(3, 4, [6])
    strided = relayout(state)
    assert not strided.is_contiguous()
    (expected,) = beam_gather([strided.contiguous()], parents, backend="reference")
    parents = parents.t().contiguous().t()
    assert torch.equal(call(beam_gather, [strided], parents, backend=backend)[0], expected)


@pytest.mark.parametrize("bad", [-1, 3, 2**40])
@pytest.mark.parametrize("backend", ["reference", "cpp"], indirect=True)
def test_a_parent_out_of_range_is_an_error_and_not_a_crash(backend, bad):
    (state,), parents = make(2, 3)
    parents[1, 2] = bad
    with pytest.raises(RuntimeError):
        beam_gather([state], parents, backend=backend)


def test_disagreeing_arguments_are_explained():
    (state,), parents = make(2, 3)
    with pytest.raises(ValueError, match=r"parents must be \(B, K\) int64; got \(2, 3\) torch.int32"):
        beam_gather([state], parents.int())
    with pytest.raises(ValueError, match=r"states\[1\] must be \(2, 3, N\) on cpu like parents; got \(2, 2, 5\)"):
        beam_gather([state, state[:, :2]], parents)
    with pytest.raises(ValueError, match="on cpu like parents; got .* on meta"):
        beam_gather([state.to("meta")], parents)


def test_auto_takes_the_cpp_path_on_a_cpu(cpp):
    states, parents = make(2, 3)
    assert ops_called(lambda: beam_gather(states, parents)) == ["las_fast::beam_gather_cpp"]


def test_the_registered_op_passes_opcheck(cpp):
    states, parents = make(2, 3, (5, 1), DTYPES[:2])
    torch.library.opcheck(torch.ops.las_fast.beam_gather_cpp.default, (states, parents))


def test_the_registered_op_checks_its_own_arguments(cpp):
    (state,), parents = make(2, 3)
    op = torch.ops.las_fast.beam_gather_cpp
    with pytest.raises(RuntimeError, match=r"parents must be \(B, K\) int64; got \[2, 3\] Int"):
        op([state], parents.int())
    with pytest.raises(RuntimeError, match=r"parents must be \(B, K\) int64; got \[2, 3, 1\] Long"):
        op([state], parents[..., None])
    with pytest.raises(RuntimeError, match=r"states\[1\] must be \(2, 3, N\) on cpu like parents; got \[2, 3\]"):
        op([state, state[..., 0]], parents)
    with pytest.raises(RuntimeError, match=r"states\[0\] must be \(2, 3, N\) on cpu like parents; got \[1, 3, 5\]"):
        op([state[:1]], parents)
    with pytest.raises(RuntimeError, match="parents must be from 0 to 2; got -1 in utterance 0"):
        op([state], torch.tensor([[0, -1, 2], [0, 1, 2]]))
    with pytest.raises(RuntimeError, match=r"states\[0\] must be \(2, 3, N\) on cpu like parents; got \[2, 2, 5\]"):
        op([state[:, :2]], parents)
    with pytest.raises(RuntimeError, match="parents must be from 0 to 2; got 7 in utterance 1"):
        op([state], torch.tensor([[0, 1, 2], [0, 7, 2]]))


def test_it_compiles_into_one_graph(cpp):
    states, parents = make(2, 3, (5, 2))
    compiled, graphs = compile_and_count(lambda x, p: beam_gather(x, p))
    for a, b in zip(compiled(states, parents), beam_gather(states, parents), strict=True):
        assert torch.equal(a, b)
    assert len(graphs) == 1


def test_two_threads_give_the_same_bits(cpp):
    states, parents = make(256, 8, (512, 300))
    with threads(2):
        actual = beam_gather(states, parents, backend=cpp)
    for a, b in zip(actual, beam_gather(states, parents, backend="reference"), strict=True):
        assert torch.equal(a, b)


def test_no_backend_passes_a_gradient_on(backend):
    state = torch.randn(2, 3, 4, requires_grad=True)
    (moved,) = call(beam_gather, [state], torch.zeros(2, 3, dtype=torch.int64), backend=backend)
    assert not moved.requires_grad
