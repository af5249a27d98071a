"""Stop signals during a training."""

import contextlib
import signal

import pytest

from las_fast.errors import InputError, Stopped
from las_fast.training import signals
from las_fast.training.signals import StopSignals


class Clock:
    now = 100.0


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(signals.time, "monotonic", lambda: Clock.now)
    Clock.now = 100.0
    return Clock


@pytest.mark.parametrize(
    ("seconds", "saving", "ends"), [(0.0, False, False), (2.0, False, False), (2.1, False, True), (2.1, True, False)]
)
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_after_two_seconds_ends_a_step_but_no_save(clock, seconds, saving, ends, second):
    stop = StopSignals()
    stop.deferred = saving
    kept = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with stop.catch():
        signal.raise_signal(signal.SIGTERM)
        assert stop.signum == signal.SIGTERM
        clock.now += seconds
        with pytest.raises(Stopped) if ends else contextlib.nullcontext() as stopped:
            signal.raise_signal(second)
        assert stop.signum == signal.SIGTERM, "the first counts"
        assert not ends or stopped.value.signum == second
        clock.now += 0.5
        with pytest.raises(Stopped) if ends or (seconds == 2.0 and not saving) else contextlib.nullcontext():
            signal.raise_signal(second)  # time counts from the first signal
    assert {s: signal.getsignal(s) for s in kept} == kept


def test_ignored_signals_stay_ignored_except_sigint():
    kept = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGHUP)}
    try:
        stop = StopSignals()
        with stop.catch():
            signal.raise_signal(signal.SIGHUP)
            assert stop.signum == 0
            signal.raise_signal(signal.SIGINT)
            assert stop.signum == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def test_deferring_can_be_nested_and_ends_with_an_error():
    stop = StopSignals()
    with stop.defer():
        with stop.defer():
            assert stop.deferred
        assert stop.deferred
    assert not stop.deferred
    with pytest.raises(InputError), stop.defer():
        raise InputError("full")
    assert not stop.deferred
