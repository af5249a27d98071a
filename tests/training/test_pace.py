"""The pace of a training, and the forecast of how long the rest takes."""

import pytest

from las_fast.training import pace as module
from las_fast.training.pace import Pace


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets: clock[0] is the time in seconds."""
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("steps", "seconds", "known"), [(5, 20, True), (4, 60, False), (9, 19.9, False), (0, 90, False)]
)
def test_the_pace_is_known_after_five_steps_and_twenty_seconds(clock, steps, seconds, known):
    pace = Pace()
    for _ in range(steps):
        pace.add_step(1.0)
    clock[0] += seconds
    assert pace.is_known() == known


def test_a_long_training_says_how_long_it_will_take(clock):
    pace = Pace()
    for _ in range(10):
        pace.add_step(30.0)
    clock[0] += 20.0
    assert pace.forecast(149) == ""
    begin = "at 2 s per step, 15 x real time, the other"
    assert pace.forecast(150) == f"{begin} 150 steps take about 5 min, validations not included"
    assert pace.forecast(43_200) == f"{begin} 43200 steps take about 24.0 h, validations not included"
    assert pace.forecast(50_000).endswith("27.8 h, validations not included; --data.hours 1 in a run of its own tries "
                                          "settings on an hour of the data")  # fmt: skip


def test_the_summary_has_the_mean_of_the_losses_if_any(clock):
    pace = Pace()
    assert pace.summary() == ""
    pace.add_step(30.0)
    pace.wait_seconds = 0.5
    clock[0] += 2.0
    assert pace.summary() == "; trained at 15 x real time, 25.0% of the time waiting for data"
    pace.losses = [2.0, 3.5]
    assert pace.summary().startswith("; training loss 2.750, trained at 15")
