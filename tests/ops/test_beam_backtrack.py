import pytest
import torch

from las_fast.ops import backends, beam_backtrack

EOS = 2
needs_extension = pytest.mark.skipif(
    backends.EXTENSION_PROBLEM is not None, reason=f"no C++ extension: {backends.EXTENSION_PROBLEM}"
)
BACKENDS = ["reference", pytest.param("cpp", marks=needs_extension)]


def random(L, B, K, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 9, (L, B, K), generator=generator)
    return tokens, torch.randint(0, K, (L, B, K), generator=generator)


def plain(tokens, parents):
    """Follow each pointer by hand."""
    L, B, K = tokens.shape
    texts, paths = {}, {}
    for b in range(B):
        for k in range(K):
            beam, text, path = k, [], []
            for t in reversed(range(L)):
                text.insert(0, int(tokens[t, b, beam]))
                path.insert(0, beam)
                beam = int(parents[t, b, beam])
            texts[b, k], paths[b, k] = text, path
    return texts, paths


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("L", "B", "K"), [(1, 1, 1), (7, 3, 4), (33, 2, 8), (5, 64, 13), (0, 2, 3), (4, 0, 2)])
def test_hypotheses_follow_the_pointers(backend, L, B, K):
    tokens, parents = random(L, B, K)
    hypotheses, lengths, paths = beam_backtrack(tokens, parents, eos=EOS, paths=True, backend=backend)
    texts, expected_paths = plain(tokens, parents)
    assert hypotheses.shape == paths.shape == (B, K, L) and lengths.shape == (B, K)
    for (b, k), text in texts.items():
        n = text.index(EOS) if EOS in text else L
        assert hypotheses[b, k].tolist() == text[:n] + [EOS] * (L - n)
        assert int(lengths[b, k]) == n and paths[b, k].tolist() == expected_paths[b, k]


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_need_not_be_contiguous(backend):
    tokens, parents = random(5, 4, 3)
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (tokens, parents)]
    for a, b in zip(
        beam_backtrack(*turned, eos=EOS, backend=backend), beam_backtrack(tokens, parents, eos=EOS), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [-1, 3, 2**40])
def test_a_parent_out_of_range_is_an_error_and_not_a_crash(backend, bad):
    tokens, parents = random(4, 2, 3)
    parents[2, 1] = bad
    with pytest.raises(RuntimeError):
        beam_backtrack(tokens, parents, eos=EOS, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_pointers_of_the_first_step_are_not_followed(backend):
    tokens, parents = random(3, 2, 3)
    expected = beam_backtrack(tokens, parents, eos=EOS)
    parents[0] = -7
    assert torch.equal(beam_backtrack(tokens, parents, eos=EOS, backend=backend)[0], expected[0])


def test_disagreeing_arguments_are_explained():
    tokens, parents = random(3, 2, 4)
    with pytest.raises(ValueError, match=r"tokens must be \(L, B, K\) int64; got \(2, 4\)"):
        beam_backtrack(tokens[0], parents, eos=EOS)
    with pytest.raises(ValueError, match="parents must be .* int64; got .* torch.int32"):
        beam_backtrack(tokens, parents.int(), eos=EOS)
    with pytest.raises(ValueError, match=r"parents must be like tokens, \(3, 2, 4\) on cpu; got \(2, 2, 4\)"):
        beam_backtrack(tokens, parents[:2], eos=EOS)


@needs_extension
def test_auto_takes_the_cpp_path_on_a_cpu():
    tokens, parents = random(6, 2, 3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        beam_backtrack(tokens, parents, eos=EOS)
    assert "las_fast::beam_backtrack" in {event.name for event in profile.events()}


@needs_extension
def test_the_registered_op_passes_opcheck():
    torch.library.opcheck(torch.ops.las_fast.beam_backtrack.default, (*random(6, 2, 3), EOS))


@needs_extension
def test_the_registered_op_checks_its_own_arguments():
    tokens, parents = random(6, 2, 3)
    with pytest.raises(RuntimeError, match="parents must be int64 of shape"):
        torch.ops.las_fast.beam_backtrack(tokens, parents[:3], EOS)
    with pytest.raises(RuntimeError, match="tokens must be"):
        torch.ops.las_fast.beam_backtrack(tokens.int(), parents, EOS)


@needs_extension
def test_it_compiles_into_one_graph():
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda t, p: beam_backtrack(t, p, eos=EOS), fullgraph=True, backend=count)
    tokens, parents = random(6, 2, 3)
    assert torch.equal(compiled(tokens, parents)[0], beam_backtrack(tokens, parents, eos=EOS)[0]) and len(graphs) == 1


@needs_extension
def test_many_threads_give_the_same_answer():
    tokens, parents = random(200, 64, 8)
    expected = beam_backtrack(tokens, parents, eos=EOS, backend="reference")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found = beam_backtrack(tokens, parents, eos=EOS, backend="cpp")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
