"""The script behind make gpu-check, as far as it can run without a GPU: with other backends and a clock of its own."""

from dataclasses import replace

import pytest
import torch

from benchmarks import gpu_check
from las_fast.config import ListenerConfig, ModelConfig, SpellerConfig


def count(run):
    run()
    return 2.0


def small():
    sizes = ModelConfig(ListenerConfig((8,), (3,), (1,), 8, 1), SpellerConfig(8, 8, 8, (8, 8)))
    yield gpu_check.attention(2, 20, torch.float32, "cpu", K=3, D=8)
    yield gpu_check.pruning(2, 3, 31, "cpu")
    yield gpu_check.gathering(2, 3, "cpu")
    yield gpu_check.prefixes(2, 3, 7, 5, "cpu")
    yield gpu_check.backtracking(5, 2, 3, "cpu")
    yield gpu_check.searching(2, 64, "cpu", sizes)


def test_every_measurement_runs_and_gives_a_row_a_backend():
    of = [m if m.what == "masked_attention" else replace(m, others=()) for m in small()]  # no graphs on a CPU
    found = list(gpu_check.rows(iter(of), ("reference", "auto"), count, speed=100.0))
    assert [row[0] for row in found] == ["masked_attention"] + [m.what for m in of for _ in range(2)]
    assert all(row[4] == 2.0 for row in found)
    assert found[0][5] == (2 * 2 * 3 * 8 + 2 * 2 * 20 * 8) * 4 / 100


def test_a_search_takes_all_its_steps(monkeypatch):
    steps = []
    step = gpu_check.LAS.step
    monkeypatch.setattr(gpu_check.LAS, "step", lambda *a, **k: steps.append(1) or step(*a, **k))
    *_, search = small()
    search.run("reference")
    assert len(steps) == 128


def test_the_bandwidth_counts_both_ways():
    assert gpu_check.bandwidth(count, "cpu", numbers=1000) == 2 * 4000 / 2.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device: make gpu-check itself runs")
def test_without_a_gpu_it_says_so_and_fails(capsys):
    assert gpu_check.main() == 1
    assert "needs a CUDA device" in capsys.readouterr().out
