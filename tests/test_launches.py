"""A chunk of the search on fake CUDA tensors: it never waits for the device and launches few kernels.

The real search runs with the fake implementations of the Triton ops. Fake tensors hold no numbers, so reading one
raises. The trace of calls shows copies to the host, shapes that change between steps, and launches beyond the limit.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from toy_model import config

from las_fast.config import ListenerConfig, ModelConfig, SpellerConfig
from las_fast.model.las import LAS
from las_fast.ops import Ctc, Ngram, NgramModel, backends, beam_topk, table_model
from las_fast.search import steps
from las_fast.search.beam import fold_length_reward, length_limits
from las_fast.text import SOS

V, MAX_LAUNCHES = 31, 16
MAX_LAUNCHES_WITH_CTC = 17
BIGRAMS = table_model(torch.zeros(V, V), SOS)
NO_LAUNCH = {  # views, and allocations and queries that need no kernel
    "_unsafe_view", "alias", "detach", "device", "empty_like", "expand", "slice", "split",
    "split_with_sizes", "t", "transpose", "unsqueeze", "view",
}  # fmt: skip
LAUNCHES = {"masked_attention_triton": 2}  # with split frames: one for the parts, one to combine them


class Trace(TorchDispatchMode):
    """Records the calls of each step: (name, input shapes, output shapes)."""

    def __init__(self):
        super().__init__()
        self.outside: list[tuple] = []  # calls outside of steps
        self.steps: list[list[tuple]] = []
        self.current = self.outside

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        tensors = [[x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in ((arguments, named), result)]
        assert all(x.is_cuda for x in sum(tensors, [])), f"{function.name()} leaves the device"
        name = function.name().split("::")[1].split(".")[0]
        self.current.append((name, *([tuple(x.shape) for x in part] for part in tensors)))
        return result

    def around(self, step):
        """Wrap step, so that its calls are recorded as one step."""

        def traced(*arguments):
            self.current = []
            self.steps.append(self.current)
            result = step(*arguments)
            self.current = self.outside
            return result

        return traced

    def launches(self) -> list[str]:
        """The kernels of the last step, in order."""
        return [name for name, *_ in self.steps[-1] for _ in range(LAUNCHES.get(name, name not in NO_LAUNCH))]


def to_fake_cuda(tree):
    """Replace each tensor of a tree by an empty fake CUDA tensor."""
    return tree_map_only(Tensor, lambda x: torch.empty(x.shape, dtype=x.dtype, device="cuda"), tree)


@pytest.fixture
def trace_chunk(monkeypatch):
    """A function that runs one chunk of a model with two LSTM cells and checks that all steps are equal."""
    monkeypatch.setattr(backends, "_triton_problem", lambda: None)
    # The method makes the device current, which a CPU build cannot.
    monkeypatch.setattr(Tensor, "copy_", lambda x, other: torch.ops.aten.copy_.default(x, other))
    step = steps.step

    def trace_chunk(kind: type[LAS] = LAS, ngram: NgramModel | None = None, **fields) -> Trace:
        speller = SpellerConfig(key_size=16, value_size=8, embedding_size=12, lstm_sizes=(24, 20))
        sizes = ModelConfig(ListenerConfig((8,), (3,), (2,), 8, 1), speller, ctc_layer=0)
        model = kind(sizes, input_size=4, vocabulary_size=V)
        one, trace = steps.Search(model.eval(), config(**fields), ngram, "auto"), Trace()
        with torch.no_grad():
            memory = model.listen(torch.randn(3, 200, 4), torch.tensor([200, 100, 7]))
            limits = length_limits(memory.lengths * model.time_reduction, one.config)
            inputs, beams = steps.begin(one, memory, limits)
        monkeypatch.setattr(steps, "step", trace.around(step))
        with torch.no_grad(), FakeTensorMode():
            for module in model.modules():
                module._parameters, module._buffers = to_fake_cuda(module._parameters), to_fake_cuda(module._buffers)
            inputs, beams = to_fake_cuda(inputs), to_fake_cuda(beams)
            beams = beams._replace(state=steps.stepping_model(one).start(inputs.memory, one.config.beam))
            with trace:
                moved = ngram and replace(ngram, rows=to_fake_cuda(ngram.rows), arcs=to_fake_cuda(ngram.arcs))
                steps.advance(replace(one, ngram=moved), inputs, beams)
        assert len(trace.steps) == steps.STEPS_PER_CHUNK // 2  # of a short text on CUDA
        for before, after in zip(trace.steps, trace.steps[1:], strict=False):
            assert before == after, "two steps make different calls"
        return trace

    return trace_chunk


def test_a_step_launches_at_most_sixteen_kernels(trace_chunk):
    launched = trace_chunk().launches()
    assert len(launched) <= MAX_LAUNCHES, launched
    assert {f"{op}_triton" for op in ("masked_attention", "beam_topk", "beam_gather")} < set(launched)
    assert launched.count("_thnn_fused_lstm_cell") == 2


def test_a_step_in_bf16_launches_no_more(trace_chunk):
    launched = trace_chunk(precision="bf16").launches()
    assert len(launched) <= MAX_LAUNCHES, launched
    assert launched.count("_thnn_fused_lstm_cell") == 2


def test_with_ctc_a_step_launches_one_kernel_more(trace_chunk):
    launched = trace_chunk(ctc_weight=0.3).launches()
    assert len(launched) <= MAX_LAUNCHES_WITH_CTC and launched.count("ctc_prefix_triton") == 1, launched
    assert "ctc_prefix_triton" not in trace_chunk().launches()


def test_with_a_language_model_a_step_launches_one_kernel_more(trace_chunk):
    launched = trace_chunk(ngram=BIGRAMS, ngram_weight=0.3).launches()
    assert len(launched) <= MAX_LAUNCHES + 1 and launched.count("ngram_scores_triton") == 1, launched
    assert "ngram_scores_triton" not in trace_chunk().launches()


def test_besides_its_steps_a_chunk_only_stacks_and_computes_the_flag(trace_chunk):
    names = [name for name, *_ in trace_chunk().outside if name not in NO_LAUNCH]
    assert names == [*["stack"] * 4, "isneginf", "bitwise_or", "all"]


@pytest.mark.parametrize(
    "fields",
    [
        {"beam": 1},
        {"coverage_weight": 0.1},
        {"minimum_share": 0.1, "eos_threshold": 1.5, "length_penalty": 1.0},
        {"ngram": BIGRAMS, "ngram_weight": 0.3},
        {"ctc_weight": 0.3},
        {"precision": "bf16"},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_no_option_synchronises_or_changes_a_shape(trace_chunk, fields):
    assert trace_chunk(**fields).steps


def test_attention_weights_are_computed_only_for_coverage(trace_chunk):
    made = {}
    for weight in (0.0, 0.1):
        calls = trace_chunk(coverage_weight=weight).steps[-1]
        ((_, _, made[weight]),) = [call for call in calls if call[0] == "masked_attention_triton"]
    assert (3, 4, 50) in made[0.1] and (3, 4, 50) not in made[0.0]


class HostCopies(TorchDispatchMode):
    """Records the ops that would copy from the host or wait for the device on CUDA."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        name = function.name().split("::")[1].split(".")[0]
        if (
            name in ("_local_scalar_dense", "nonzero")
            or (name == "lift_fresh" and arguments[0].dim() > 0)  # torch.tensor of a list
            or (name == "copy_" and arguments[1].dim() == 0)  # a number written to one element
        ):
            self.names.append(name)
        return function(*arguments, **(named or {}))


@torch.no_grad()
def test_beams_beyond_the_triton_op_copy_nothing_from_the_host():
    """Fake CUDA tensors cannot be indexed in a CPU build, so the reference runs on the CPU."""
    B, K = 2, 130
    with HostCopies() as copies:
        beam_topk(
            torch.zeros(B, K, V), torch.zeros(B, K), torch.zeros(B, K, dtype=torch.bool), eos=2,
            lengths=torch.zeros(B, K, dtype=torch.int64), minimum=torch.ones(B, dtype=torch.int64),
            maximum=torch.ones(B, dtype=torch.int64), eos_threshold=1.5, length_penalty=1.0, coverage=torch.zeros(B, K),
            ngram=Ngram(torch.zeros(B, K, V), 0.3),
            ctc=Ctc(torch.zeros(B, K, V), 0.3), backend="reference",
        )  # fmt: skip
    assert copies.names == []


@torch.no_grad()
def test_the_beams_before_the_first_step_copy_no_number_from_the_host():
    """A number written to a row is a fill on CUDA; written to one element, it is a copy from the host."""
    model = LAS(ModelConfig(ListenerConfig((8,), (3,), (2,), 8, 1), ctc_layer=0), input_size=4, vocabulary_size=V)
    memory = model.eval().listen(torch.randn(3, 40, 4), torch.tensor([40, 30, 7]))
    search = steps.Search(model, config(ctc_weight=0.3, coverage_weight=0.1), BIGRAMS, "auto")
    with HostCopies() as copies:
        fold_length_reward(None, config(length_reward=0.5), V, "cpu")
        steps.begin(search, memory, length_limits(memory.lengths, search.config))
    assert copies.names == []


class Reads(LAS):
    def step(self, tokens, *arguments, **options):
        return super().step(tokens + tokens.sum().item(), *arguments, **options)


class Copies(LAS):
    def step(self, tokens, *arguments, **options):
        return super().step(tokens.cpu().to("cuda"), *arguments, **options)


class Branches(LAS):
    def step(self, tokens, *arguments, **options):
        return super().step(tokens if (tokens == 2).all() else tokens, *arguments, **options)


class Selects(LAS):
    def step(self, tokens, *arguments, **options):
        torch.ops.aten.nonzero(tokens)  # the method queries the device first
        return super().step(tokens, *arguments, **options)


class Grows(LAS):
    def step(self, tokens, *arguments, **options):
        self.read = torch.cat((self.read, tokens), 1) if hasattr(self, "read") else tokens
        return super().step(tokens, *arguments, **options)


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        (Reads, DataDependentOutputException),
        (Branches, DataDependentOutputException),
        (Selects, DynamicOutputShapeException),
        (Copies, AssertionError),
        (Grows, AssertionError),
    ],
)
def test_a_model_that_synchronises_or_changes_shapes_is_detected(trace_chunk, kind, error):
    with pytest.raises(error):
        trace_chunk(kind)


def test_an_extra_kernel_launch_is_detected(trace_chunk):
    class ExtraKernel(LAS):
        def step(self, tokens, *arguments, **options):
            return super().step(tokens + 0, *arguments, **options)

    assert len(trace_chunk(ExtraKernel).launches()) == MAX_LAUNCHES + 1
