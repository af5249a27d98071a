"""Count the dispatcher calls, allocations and copied bytes of a training step and a search step: counts have no noise.

tests/counts.csv holds the limits. A higher count fails; a lower one warns and asks to update the table with the output
of `python tests/test_counts.py`. The counts of the float32 paths are the same on every machine.
"""

from __future__ import annotations

import csv
import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from las_fast.config import Config, DecodingConfig, FeatureConfig, ListenerConfig, ModelConfig, SpellerConfig
from las_fast.config import TrainingConfig as T
from las_fast.data.batch import Batch
from las_fast.model.las import LAS
from las_fast.ops import backends
from las_fast.search.beam import beam_search
from las_fast.search.dataset import decode_dataset
from las_fast.search.steps import STEPS_PER_CHUNK
from las_fast.text import EOS, Vocabulary
from las_fast.training.trainer import Trainer

TORCH = "2.13"  # the version of the table: others decompose calls differently
TABLE = Path(__file__).with_name("counts.csv")
COPIES = {"_to_copy", "cat", "clone", "copy_", "stack"}
MODEL = ModelConfig(
    ListenerConfig(conv_channels=(8,), conv_kernels=(3,), conv_strides=(2,), lstm_size=8, pyramids=1, dropout=0.1),
    SpellerConfig(key_size=16, value_size=8, embedding_size=8, lstm_sizes=(16, 8), dropout=0.1),
    ctc_layer=1,
)
TRAINING = T(ctc_weight=0.5, guided_weight=1.0, precision="fp32")
CONFIG = Config(features=FeatureConfig(size=4), model=MODEL, training=TRAINING)
FRAMES = 64


class Counts(TorchDispatchMode):
    """Counts dispatcher calls below autograd, results that own memory, and copied bytes."""

    def __init__(self):
        super().__init__()
        self.calls = self.allocations = self.copied = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        taken, made = (
            {x.untyped_storage().data_ptr() for x in tree_leaves(tree) if isinstance(x, Tensor) and x.numel()}
            for tree in ((arguments, named), result)
        )
        self.calls += 1
        self.allocations += len(made - taken)
        if function.name().split("::")[1].split(".")[0] in COPIES:
            self.copied += sum(x.nbytes for x in tree_leaves(result) if isinstance(x, Tensor))
        return result

    def of(self) -> dict[str, int]:
        return {"calls": self.calls, "allocations": self.allocations, "copied bytes": self.copied}


def count(run: Callable[[], object]) -> dict[str, int]:
    run()  # cached constants are not counted
    with Counts() as counts:
        run()
    return counts.of()


def difference(more: dict[str, int], less: dict[str, int]) -> dict[str, int]:
    return {name: more[name] - less[name] for name in more}


def training_step(tokens: int, precision: str = "fp32") -> dict[str, int]:
    config = dataclasses.replace(CONFIG, training=dataclasses.replace(TRAINING, precision=precision))
    data = SimpleNamespace(frame_counts=np.array([FRAMES] * 3))
    trainer = Trainer(config, data, None, Path(), torch.device("cpu"), {})
    torch.manual_seed(0)
    spelled = torch.randint(EOS + 1, len(trainer.vocabulary), (3, tokens))
    spelled[:, -1] = EOS
    lengths = torch.full((3,), FRAMES), torch.full((3,), tokens)
    batch = Batch(torch.randn(3, FRAMES, 4), lengths[0], spelled, lengths[1], torch.arange(3))
    return count(lambda: trainer.train_step(batch))


def search(path: str, steps: int, beam: int = 4) -> dict[str, int]:
    model, memory = listened()
    config = DecodingConfig(beam=beam, minimum_share=1.0, maximum_share=0.0, maximum_extra=steps - 1)  # and <eos>
    backend, capture = (path.removesuffix(" steps"), False) if path.endswith(" steps") else (path, None)
    return count(lambda: beam_search(model, memory, config, backend=backend, capture=capture))


def listened():
    torch.manual_seed(0)
    model = LAS(MODEL, input_size=4, vocabulary_size=31).eval()
    with torch.inference_mode():
        return model, model.listen(torch.randn(3, FRAMES, 4), torch.tensor([FRAMES, 50, 20]))


def count_functions() -> dict[tuple[str, str], Callable[[], dict[str, int]]]:
    """Counts by (quantity, path). "cpp" is the whole search in one op, "cpp steps" one op at a time."""
    counted = {
        ("training step", "fp32"): lambda: training_step(12),
        ("extra token in a training step", "fp32"): lambda: difference(training_step(13), training_step(12)),
        ("extra token in a training step", "bf16"): lambda: difference(
            training_step(13, "bf16"), training_step(12, "bf16")
        ),
    }
    for path in ("reference", "cpp steps", "cpp"):
        counted["search of 16 steps", path] = lambda path=path: search(path, STEPS_PER_CHUNK)
        counted["16 extra steps of a search", path] = lambda path=path: difference(
            search(path, 2 * STEPS_PER_CHUNK), search(path, STEPS_PER_CHUNK)
        )
    return counted


def table() -> dict[tuple[str, str], dict[str, int]]:
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    kept: dict[tuple[str, str], dict[str, int]] = {}
    for row in rows:
        kept.setdefault((row["what"], row["path"]), {})[row["quantity"]] = int(row["count"])
    return kept


def skip_if_unavailable(path: str) -> None:
    backend = "reference" if path == "reference" else "cpp"  # training uses it as well
    if (reason := backends.unavailable("beam_topk", backend)) is not None:
        pytest.skip(reason)


@pytest.mark.parametrize(("what", "path"), count_functions())
def test_calls_allocations_and_bytes_stay_within_the_table(what, path):
    skip_if_unavailable(path)
    if not torch.__version__.startswith(TORCH + "."):
        pytest.skip(f"counts.csv is of torch {TORCH}, this is {torch.__version__}")
    counts, limits = count_functions()[what, path](), table()[what, path]
    for quantity, limit in limits.items():
        assert counts[quantity] <= limit, f"{what}, {path}: {counts[quantity]} {quantity}; counts.csv allows {limit}"
        if counts[quantity] < limit:
            fewer = f"{counts[quantity]} {quantity} instead of {limit}; lower the number in {TABLE.name}"
            warnings.warn(f"{what}, {path}: {fewer}", stacklevel=1)


def test_the_table_has_a_row_for_each_quantity_that_is_counted():
    assert table().keys() == count_functions().keys()
    assert all(limits.keys() == Counts().of().keys() for limits in table().values())


def test_counts_are_reproducible():
    assert training_step(12) == training_step(12)
    assert search("reference", STEPS_PER_CHUNK) == search("reference", STEPS_PER_CHUNK)


def test_an_extra_copy_and_an_extra_allocation_are_counted():
    x = torch.ones(6)
    plain = count(lambda: x + 1)
    assert plain == {"calls": 1, "allocations": 1, "copied bytes": 0}
    assert count(lambda: (x + 1).clone()) == {"calls": 2, "allocations": 2, "copied bytes": 24}
    assert count(lambda: x.view(2, 3).t().contiguous()) == {"calls": 3, "allocations": 1, "copied bytes": 24}
    assert count(lambda: x.add_(0.0))["allocations"] == 0


class RandomDataset:
    """A dataset of random frames."""

    def __init__(self, count: int):
        self.ids, self.texts = [str(i) for i in range(count)], [None] * count
        self.frame_counts, self.seconds, self.blocks = np.full(count, FRAMES), np.full(count, FRAMES / 100), 1

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> Tensor:
        return torch.randn(FRAMES, 4, generator=torch.Generator().manual_seed(i))


def peak_bytes(run: Callable[[], object]) -> int:
    """Peak bytes of the tensors that run() allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    now = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def test_memory_of_decoding_does_not_grow_with_the_number_of_utterances():
    model, _ = listened()
    config = DecodingConfig(beam=4, frames_per_batch=4 * FRAMES)
    vocabulary = Vocabulary()

    def decode(count: int) -> int:
        data = RandomDataset(count)
        return peak_bytes(lambda: decode_dataset(model, data, vocabulary, config, progress=False, device="cpu"))

    decode(4)
    few, many = decode(4), decode(16)
    assert few > 4 * FRAMES * 4 * 4  # at least the features: the measurement works
    assert many <= 1.05 * few


if __name__ == "__main__":
    print("what,path,quantity,count")
    for (what, path), run in count_functions().items():
        for quantity, number in run().items():
            print(f"{what},{path},{quantity},{number}")
