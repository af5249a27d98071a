"""Benchmark time and peak memory of the decode command over the number of utterances and over their length.

Each run is a separate process, so that its peak memory can be read. A first run fills the feature cache. Seconds are
those that the command prints, from the first batch to the last.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.interleaved import busy_seconds
from benchmarks.rows import CONTEXT, RESULTS, append_rows, context
from benchmarks.synthetic_speech import frame_counts, write_manifest, write_untrained_checkpoint

COLUMNS = (*CONTEXT, "over", "size", "audio_seconds", "seconds", "peak_mib", "load")
UTTERANCES = (100, 200, 400, 800, 1600)
SECONDS = (10, 20, 40, 80, 160, 320)  # of one recording
FRAME_COUNTS = {  # of each recording
    "utterances": {n: frame_counts(n) for n in UTTERANCES},
    "seconds of one recording": {n: [100 * n] for n in SECONDS},
}
ROUNDS = 3
MAX_GROWTH = 1.1  # of peak memory when the number of utterances doubles
ROOT = Path(__file__).parents[1]


class Run(NamedTuple):
    """One run of the command."""

    seconds: float
    audio_seconds: float
    peak: float  # MiB
    load: float  # cores kept busy by other programs


def decode(checkpoint: Path, data: Path, threads: int) -> Run:
    """Run the decode command once."""
    argv = ["--checkpoint", checkpoint, "--data", data, "--split", "dev", "--out", data / "out.csv"]
    command = [sys.executable, "-m", "las_fast.decode", *map(str, argv)]
    environment = os.environ | {"XDG_CACHE_HOME": str(data / "cache"), "OMP_NUM_THREADS": str(threads)}
    before, started = busy_seconds(), time.perf_counter()
    with (data / "log").open("w+") as log, (data / "errors").open("w") as errors:
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        output = log.read()
    assert process.returncode == 0, (data / "errors").read_text()
    result = json.loads(output.splitlines()[-1])
    other_seconds = busy_seconds() - before - usage.ru_utime - usage.ru_stime
    load = max(0.0, other_seconds) / (time.perf_counter() - started)
    return Run(result["seconds"], result["audio_seconds"], usage.ru_maxrss / 1024, load)


@pytest.mark.parametrize("over", FRAME_COUNTS)
def test_time_and_peak_memory_of_decode(long, tmp_path, threads, request, capsys, over):
    checkpoint = write_untrained_checkpoint(tmp_path / "untrained.safetensors")
    rows = []
    for size, counts in FRAME_COUNTS[over].items():
        data = write_manifest(tmp_path / str(size), "ogg", counts).parent
        runs = [decode(checkpoint, data, threads) for _ in range(1 + ROUNDS)][1:]  # the first fills the cache
        run = sorted(runs)[ROUNDS // 2]
        run = run._replace(peak=max(x.peak for x in runs))
        numbers = run.audio_seconds, run.seconds, round(run.peak, 1), round(run.load, 2)
        rows.append((*context(), over, size, *numbers))
        with capsys.disabled():
            print(f"\n{size:>5} {over}: {run.seconds:.2f} s, {run.peak:.0f} MiB; load {run.load:.2f} cores", end="")
    if request.config.getoption("--record"):
        append_rows(RESULTS / "growth.csv", COLUMNS, rows)
    peaks = [row[COLUMNS.index("peak_mib")] for row in rows]
    if over == "utterances":
        assert all(b < MAX_GROWTH * a for a, b in pairwise(peaks)), "peak memory grows with the number of utterances"
