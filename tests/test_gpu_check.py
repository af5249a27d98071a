"""Test the script behind make gpu-check without a GPU: with CPU backends and a fake timer."""

from dataclasses import replace

import pytest
import torch

from benchmarks import gpu_check
from las_fast.config import ListenerConfig, ModelConfig, SpellerConfig


def fake_timer(run):
    run()
    return 2.0


def small_measurements():
    config = ModelConfig(ListenerConfig((8,), (3,), (1,), 8, 1), SpellerConfig(8, 8, 8, (8, 8)))
    yield gpu_check.attention(2, 20, torch.float32, "cpu", K=3, D=8)
    yield gpu_check.topk(2, 3, 31, "cpu")
    yield gpu_check.gather(2, 3, "cpu")
    yield gpu_check.ctc_prefixes(2, 3, 7, 5, "cpu")
    yield gpu_check.backtrack(5, 2, 3, "cpu")
    yield gpu_check.search(2, 64, "cpu", config)


def test_every_measurement_gives_one_row_per_backend():
    # no CUDA graphs on a CPU
    measurements = [m if m.what == "masked_attention" else replace(m, extra_backends=()) for m in small_measurements()]
    rows = list(gpu_check.time_all(iter(measurements), ("reference", "auto"), fake_timer, bytes_per_us=100.0))
    assert [row[0] for row in rows] == ["masked_attention"] + [m.what for m in measurements for _ in range(2)]
    assert all(row[4] == 2.0 for row in rows)
    assert rows[0][5] == (2 * 2 * 3 * 8 + 2 * 2 * 20 * 8) * 4 / 100


def test_a_search_takes_all_its_steps(monkeypatch):
    steps = []
    step = gpu_check.LAS.step
    monkeypatch.setattr(gpu_check.LAS, "step", lambda *a, **k: steps.append(1) or step(*a, **k))
    *_, search = small_measurements()
    search.run("reference")
    assert len(steps) == 128


def test_bandwidth_counts_reads_and_writes():
    assert gpu_check.bandwidth(fake_timer, "cpu", size=1000) == 2 * 4000 / 2.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device: make gpu-check itself runs")
def test_without_a_gpu_it_fails_with_a_reason(capsys):
    assert gpu_check.main() == 1
    assert "needs a CUDA device" in capsys.readouterr().out
