"""Run a training step as on CUDA, on fake tensors: it launches few kernels, and the host waits at most once.

Fake tensors hold no numbers, so reading one raises. They are CPU tensors, because a build without CUDA cannot slice
fake CUDA tensors, and the choices by device are patched. Stand-ins replace the decoder pass, which has its own test of
launches, and cuDNN, which is one call per direction of a layer and casts its weights itself.
"""

import contextlib
import dataclasses
import importlib
import math
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.utils import clip_grad
from torch.utils._python_dispatch import TorchDispatchMode

from las_fast.config import Config, FeatureConfig, ListenerConfig, ModelConfig, SpellerConfig, TrainingConfig
from las_fast.data.batch import Batch
from las_fast.model import listener, speller
from las_fast.ops import backends
from las_fast.text import EOS
from las_fast.training import step
from las_fast.training.trainer import Trainer

bilstm_module = importlib.import_module("las_fast.ops.bilstm")
# For a step with hw4p2's layers, outside the decoder pass and cuDNN. Other versions of torch decompose ops differently.
MAX_LAUNCHES = 318 if torch.__version__.startswith("2.13.") else 400
LAUNCHES = {"ctc_loss_triton": 28, "ctc_token_times_triton": 22}  # ops that launch several
NO_LAUNCH = {  # views, allocations, and queries that the host answers itself
    "_record_function_enter_new", "_record_function_exit", "_reshape_alias", "_unsafe_view", "alias", "as_strided",
    "detach", "device", "empty", "empty_like", "empty_strided", "expand", "is_same_size", "new_empty",
    "new_empty_strided", "permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose",
    "unbind", "unsqueeze", "view",
}  # fmt: skip
CUDNN = {"convolution", "convolution_backward"}
# Tensors per launch of ops on lists of tensors: a limit that depends on the number of lists
# (aten/src/ATen/native/cuda/MultiTensorApply.cuh).
PER_LAUNCH = {"_foreach_norm": 110, "_foreach_mul_": 110, "_foreach_add_": 110, "_foreach_sub_": 64,
              "_foreach_lerp_": 64, "_fused_adamw_": 36, "_amp_foreach_non_finite_check_and_unscale_": 110}  # fmt: skip
MODEL = ModelConfig(  # the layers of preset hw4p2, smaller
    ListenerConfig((8,), (5,), (1,), lstm_size=8, pyramids=3, dropout=0.3),
    SpellerConfig(key_size=8, value_size=8, embedding_size=8, lstm_sizes=(16, 8), dropout=0.3),
    ctc_layer=1,
)


class Count(TorchDispatchMode):
    """Counts launches by op and waits by cause."""

    def __init__(self):
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.paused = False

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        name = function.name().split("::")[1].split(".")[0]
        if not self.paused and name not in NO_LAUNCH | CUDNN:
            lists = len(arguments[0]) if name in PER_LAUNCH else 1
            self.launches[name] += LAUNCHES.get(name, math.ceil(lists / PER_LAUNCH.get(name, 1)))
        return function(*arguments, **(named or {}))

    @contextlib.contextmanager
    def pause(self):
        self.paused = True
        yield
        self.paused = False


def stand_in(count, shapes):
    """Return a differentiable function whose results have the shapes `shapes(*tensors)`. It counts no launches."""

    class StandIn(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            ctx.save_for_backward(*tensors)
            with count.pause():
                results = tuple(tensors[0].new_empty(shape, dtype=torch.float32) for shape in shapes(*tensors))
                return results if len(results) > 1 else results[0]

        @staticmethod
        def backward(ctx, *gradients):
            with count.pause():
                return tuple(torch.empty_like(x) if x.is_floating_point() else None for x in ctx.saved_tensors)

    return StandIn.apply


def patch_operations(monkeypatch, count):
    """Replace cuDNN's LSTM and the decoder pass by stand-ins."""
    lstm = stand_in(count, lambda x, *weights: [(*x.shape[:2], weights[1].shape[1])])
    monkeypatch.setattr(torch, "lstm", lambda x, state, weights, *options: (lstm(x, *weights),))

    def unroll(weights, keys, values, lengths, tokens, sampled, masks, **options):
        sizes = (*tokens.shape, len(weights.embedding)), (*tokens.shape, keys.shape[1])
        return stand_in(count, lambda *tensors: sizes)(keys, values, *weights.flat())

    monkeypatch.setattr(speller, "speller_unroll", unroll)


def patch_device(monkeypatch, count):
    """Let CPU tensors take the paths of CUDA, with streams that do nothing."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(bilstm_module, "stream_for", lambda purpose, device: stream)
    monkeypatch.setattr(Tensor, "record_stream", lambda x, stream: None)
    monkeypatch.setattr(listener, "on_cuda", lambda x: True)
    monkeypatch.setattr(clip_grad, "_has_foreach_support", lambda tensors, device: True)  # not for fake CPU tensors
    monkeypatch.setattr(backends, "choose", lambda op, *given: "triton" if op == "ctc_loss" else "reference")
    for name in ("cpu", "numpy", "tolist"):
        monkeypatch.setattr(Tensor, name, lambda x, name=name: pytest.fail(f"{name}() waits for the device"))

    class Flag:
        def __init__(self, flag):
            assert flag.shape == ()
            count.launches["copy of the flag"] += 1

        def read(self):
            count.waits["flag"] += 1
            return True

    monkeypatch.setattr(step, "PendingFlag", Flag)


def replace_by_fakes(model):
    """Replace parameters and buffers by fake ones; call in a FakeTensorMode."""
    for module in model.modules():
        for name, x in module._parameters.items():
            module._parameters[name] = x if x is None else torch.nn.Parameter(torch.empty(x.shape))
        for name, x in module._buffers.items():
            module._buffers[name] = torch.empty(x.shape)


@pytest.fixture
def count_step(monkeypatch):
    """A function that takes three training steps with given settings and returns the Count of the third."""

    def count_step(trainer_class: type[Trainer] = Trainer, **settings) -> Count:
        settings = {"ctc_weight": 0.3, "guided_weight": 1.0, "guided_until": 5.0, "ema_decay": 0.9} | settings
        settings = TrainingConfig(precision="bf16", **settings)
        config = Config(features=FeatureConfig(size=4), model=MODEL, training=settings)
        data = SimpleNamespace(frame_counts=np.array([64] * 3))
        monkeypatch.setattr(step, "needs_loss_scale", lambda precision, device: True)
        training = trainer_class(config, data, None, Path(), torch.device("cpu"), {})
        training.reads_late = True
        with FakeTensorMode():
            for model in filter(None, (training.model, training.averaged)):
                replace_by_fakes(model)
            training.optimiser = step.make_optimiser(training.model, config)
            tokens = torch.full((3, 12), EOS)
            batch = Batch(torch.randn(3, 64, 4), torch.full((3,), 64), tokens, torch.full((3,), 12), torch.arange(3))
            count = Count()
            patch_operations(monkeypatch, count)
            patch_device(monkeypatch, count)
            for _ in range(3):
                count.launches.clear()
                count.waits.clear()
                with count:
                    training.train_step(batch)
        return count

    return count_step


def test_a_step_launches_few_kernels_and_waits_only_for_the_previous_step(count_step):
    count = count_step()
    assert count.launches.total() <= MAX_LAUNCHES, count.launches.most_common()
    assert count.launches["ctc_loss_triton"] == LAUNCHES["ctc_loss_triton"] and count.waits == {"flag": 1}


@pytest.mark.parametrize("op", LAUNCHES)
def test_the_ctc_ops_read_no_value_and_launch_as_many_kernels_as_are_counted(op, monkeypatch):
    kernels = importlib.import_module("las_fast.kernels.ctc_loss")
    launched = []
    monkeypatch.setattr(kernels, "states_kernel", defaultdict(lambda: lambda *_, **__: launched.append(1)))
    run, flags = getattr(kernels, op.removesuffix("_triton")), [True] if op == "ctc_loss_triton" else []
    with FakeTensorMode(), Count() as count:
        lengths = torch.empty(3, dtype=torch.int64)
        run(torch.empty(3, 32, 31), lengths, torch.empty(3, 11, dtype=torch.int64), lengths, *flags)
    assert count.launches.total() + len(launched) == LAUNCHES[op]


@pytest.mark.parametrize(
    "settings",
    [
        {"ctc_weight": 0.0, "guided_weight": 0.0},
        {"guided_frames": 6.0},
        {"ema_decay": 0.0},
        {"label_smoothing": 0.1, "clip_norm": 5.0},
    ],
)
def test_no_setting_adds_a_wait(count_step, settings):
    assert count_step(**settings).waits == {"flag": 1}


class ReadsTheLoss(Trainer):
    def train_step(self, batch):
        parts = super().train_step(batch)
        return {"loss": float(parts["loss"])}


class ComparesTheNorm(Trainer):
    def _clip(self):
        norm = super()._clip()
        return norm if norm > 0 else norm


class ReadsAtOnce(Trainer):
    def _update(self, norm):
        self.reads_late = False
        super()._update(norm)


class SettlesAtOnce(Trainer):
    def _update(self, norm):
        super()._update(norm)
        self.settle()
        self.pending = step.PendingFlag(norm)


class CopiesLengths(Trainer):
    def train_step(self, batch):
        return super().train_step(dataclasses.replace(batch, token_lengths=batch.token_lengths.cpu()))


@pytest.mark.parametrize("trainer_class", [ReadsTheLoss, ComparesTheNorm, ReadsAtOnce, CopiesLengths, SettlesAtOnce])
def test_a_trainer_that_waits_is_detected(count_step, trainer_class):
    try:
        waits = count_step(trainer_class).waits
    except (DataDependentOutputException, pytest.fail.Exception):
        return
    assert waits["flag"] == 2


def test_an_additional_launch_is_counted(count_step):
    class Wasteful(Trainer):
        def _clip(self):
            return super()._clip() + 0

    assert count_step(Wasteful).launches.total() == count_step().launches.total() + 1
