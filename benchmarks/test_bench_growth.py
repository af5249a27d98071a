"""What the decode command takes as there is more to decode: more utterances, or a longer one.

Each run is a process of its own, so that its peak memory is its own. Features are in the cache by then; seconds are
those of the command's own line, from the first batch to the last.
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

from benchmarks import record
from benchmarks.made import frame_counts, manifest, untrained
from benchmarks.paired import busy_seconds

COLUMNS = (*record.WHERE, "over", "size", "audio_seconds", "seconds", "peak_mib", "load")
UTTERANCES = (100, 200, 400, 800, 1600)
SECONDS = (10, 20, 40, 80, 160, 320)  # of one recording
FRAMES = {  # of each recording
    "utterances": {n: frame_counts(n) for n in UTTERANCES},
    "seconds of one recording": {n: [100 * n] for n in SECONDS},
}
ROUNDS = 3
MOST = 1.1  # peak memory beside that of half as many utterances
ROOT = Path(__file__).parents[1]


class Run(NamedTuple):
    """One run of the command."""

    seconds: float
    audio_seconds: float
    peak: float  # MiB of memory
    load: float  # cores that other programs kept busy


def decode(checkpoint: Path, data: Path, threads: int) -> Run:
    words = ["--checkpoint", checkpoint, "--data", data, "--split", "dev", "--out", data / "out.csv"]
    command = [sys.executable, "-m", "las_fast.decode", *map(str, words)]
    environment = os.environ | {"XDG_CACHE_HOME": str(data / "cache"), "OMP_NUM_THREADS": str(threads)}
    before, started = busy_seconds(), time.perf_counter()
    with (data / "log").open("w+") as log:
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        said = log.read()
    assert process.returncode == 0, said
    result = json.loads(said.splitlines()[-1])
    others = busy_seconds() - before - usage.ru_utime - usage.ru_stime
    load = max(0.0, others) / (time.perf_counter() - started)
    return Run(result["seconds"], result["audio_seconds"], usage.ru_maxrss / 1024, load)


@pytest.mark.parametrize("over", FRAMES)
def test_decoding_more(long, tmp_path, threads, request, capsys, over):
    checkpoint = untrained(tmp_path / "untrained.safetensors")
    rows = []
    for size, frames in FRAMES[over].items():
        data = manifest(tmp_path / str(size), "ogg", frames).parent
        runs = [decode(checkpoint, data, threads) for _ in range(1 + ROUNDS)][1:]  # the first computes features
        run = sorted(runs)[ROUNDS // 2]
        run = run._replace(peak=max(x.peak for x in runs))
        numbers = run.audio_seconds, run.seconds, round(run.peak, 1), round(run.load, 2)
        rows.append((*record.where(), over, size, *numbers))
        with capsys.disabled():
            print(f"\n{size:>5} {over}: {run.seconds:.2f} s, {run.peak:.0f} MiB; others {run.load:.2f} cores", end="")
    if request.config.getoption("--record"):
        record.append(record.RESULTS / "growth.csv", COLUMNS, rows)
    peaks = [row[COLUMNS.index("peak_mib")] for row in rows]
    if over == "utterances":
        assert all(b < MOST * a for a, b in pairwise(peaks)), "peak memory grows with the number of utterances"
