"""Send a load of requests to las_fast.serve on this machine, and check every answer.

    python -m benchmarks.serve --data FOLDER [--requests 1000] [--clients 50] [--record]

First, two services get short recordings alternately: one decodes segments in batches, the other one at a time. The
first is also measured with a single client that waits for each answer. This gives the speedup of batching, in time and
in CPU time.

Then the first service gets --requests requests from --clients clients. GOOD_SHARE of them have valid recordings; the
others are too large, malformed or aborted. Each answer must have the documented status, each text must be that of
Recogniser.transcribe, and no file may be left behind. The memory of the first and last third is reported.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import soundfile

import las_fast
from benchmarks.rows import CONTEXT, RESULTS, append_rows, context
from las_fast.checkpoint import current_name
from las_fast.cli import run
from las_fast.errors import InputError
from las_fast.files import DEFAULT_MODEL

FILE = RESULTS / "serve.csv"
COLUMNS = (*CONTEXT, "load", "checkpoint", "clients", "quantity", "value", "unit")
PATH = "/v1/audio/transcriptions"
GOOD_SHARE = 0.75  # of the requests: valid recordings
KINDS = ("oversize", "not audio", "cut off", "wrong model", "aborted upload", "aborted wait")  # of the other requests
EXPECTED = {"good": 200, "oversize": 413, "not audio": 400, "cut off": 400, "wrong model": 404}
MAX_MEGABYTES = 1  # --max-megabytes of the service
RECORDING_SECONDS = (1.0, 5.0)  # minimum and maximum
ROUNDS, REQUESTS_PER_ROUND = 3, 60  # of the comparison
MIN_REQUESTS = 20  # of the mixed load, for its percentiles
STOP_SECONDS = 60  # for a service to finish its requests


@dataclass
class Service:
    """A running service: its process, address, and folder for temporary files."""

    process: subprocess.Popen
    url: str
    folder: Path

    def memory(self) -> float:
        """Return the resident memory in MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]

    def cpu_seconds(self) -> float:
        """Return the CPU time used so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # user and system time

    def open_files(self) -> int:
        """Return how many files are open, without sockets and pipes."""
        count = 0
        for path in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed since it was listed
                count += os.readlink(path).startswith("/")
        return count


@contextlib.contextmanager
def started(checkpoint: str, *options: str) -> Iterator[Service]:
    """Run `las-fast serve` on a free port."""
    with tempfile.TemporaryDirectory() as folder:
        argv = [sys.executable, "-m", "las_fast", "serve", "--port", "0", "--quiet", "--checkpoint", checkpoint]
        argv += ["--max-megabytes", str(MAX_MEGABYTES), *options]
        environment = {**os.environ, "TMPDIR": folder}
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=environment)
        try:
            assert process.stdout is not None
            url = re.search(r"http://\S+?(?=;)", process.stdout.readline())
            if url is None:
                raise InputError("the service did not start; its error is above")
            yield Service(process, url[0], Path(folder))
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def recordings(folder: Path, count: int) -> list[bytes]:
    """Return the contents of `count` short recordings below a folder, always the same ones."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix in (".ogg", ".flac", ".wav"))
    random.Random(0).shuffle(paths)
    short = (path for path in paths if RECORDING_SECONDS[0] <= _duration(path) <= RECORDING_SECONDS[1])
    files = [path.read_bytes() for path, _ in zip(short, range(count), strict=False)]
    if len(files) < count:
        raise InputError(f"{folder} has {len(files)} recordings of 1 to 5 seconds; this needs {count}")
    return files


def _duration(path: Path) -> float:
    try:
        return soundfile.info(path).duration
    except soundfile.LibsndfileError as error:
        raise InputError(f"{path} cannot be read ({error.error_string}); remove it") from None


@dataclass
class Load:
    """Requests of several clients to one service, and their answers."""

    service: Service
    files: list[bytes]
    texts: list[str]
    problems: list[str] = field(default_factory=list)
    statuses: Counter = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)  # duration of each good request
    memory: list[float] = field(default_factory=list)  # MB, after each request

    async def run(self, kinds: list[str], clients: int) -> float:
        """Send one request for each of `kinds`, from `clients` clients at once; return the duration in seconds."""
        waiting = list(enumerate(kinds))[::-1]
        began = time.monotonic()
        limits = httpx.Limits(max_connections=clients)
        async with httpx.AsyncClient(base_url=self.service.url, timeout=600, limits=limits) as http:

            async def client() -> None:
                while waiting:
                    await self._send(http, *waiting.pop())
                    self.memory.append(self.service.memory())

            await asyncio.gather(*(client() for _ in range(clients)))
        return time.monotonic() - began

    async def _send(self, http: httpx.AsyncClient, number: int, kind: str) -> None:
        file = self.files[number % len(self.files)]
        began = time.monotonic()
        try:
            if kind.startswith("aborted"):
                await self._abort(http, file, kind)
                self.statuses[kind, "gone"] += 1
                return
            response = await _post(http, file, kind)
        except httpx.HTTPError as error:
            self.problems.append(f"{kind}: {error!r}")
            return
        self.statuses[kind, response.status_code] += 1
        if response.status_code != EXPECTED[kind]:
            self.problems.append(f"{kind}: {response.status_code} {response.text}")
        elif kind == "good":
            self.seconds.append(time.monotonic() - began)
            if response.json()["text"] != self.texts[number % len(self.files)]:
                self.problems.append(f"another text: {response.text}")
        elif set(response.json()["error"]) != {"message", "type", "param", "code"}:
            self.problems.append(f"{kind}: {response.text}")

    async def _abort(self, http: httpx.AsyncClient, file: bytes, kind: str) -> None:
        """Break the connection in the middle of the upload, or while waiting for the answer."""
        host, port = http.base_url.host, http.base_url.port
        _, writer = await asyncio.open_connection(host, port)
        body = _form(file)
        writer.write(f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
                     "Content-Type: multipart/form-data; boundary=x\r\n\r\n".encode())  # fmt: skip
        writer.write(body if kind == "aborted wait" else body[: len(body) // 2])
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.transport.abort()


def _form(file: bytes) -> bytes:
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    return head + file + b"\r\n--x--\r\n"


async def _post(http: httpx.AsyncClient, file: bytes, kind: str) -> httpx.Response:
    if kind == "cut off":
        headers = {"content-type": "multipart/form-data; boundary=x"}
        return await http.post(PATH, content=_form(file)[:-30], headers=headers)
    if kind == "oversize":
        file = bytes(MAX_MEGABYTES * 2**20 + 1)
    elif kind == "not audio":
        file = random.Random(len(file)).randbytes(len(file))
    return await http.post(PATH, files={"file": file}, data={"model": "nothing" if kind == "wrong model" else ""})


def mixed(count: int) -> list[str]:
    """Return the kinds of `count` requests, in an order that is random but always the same."""
    good = round(GOOD_SHARE * count)
    kinds = ["good"] * good + [KINDS[i % len(KINDS)] for i in range(count - good)]
    random.Random(1).shuffle(kinds)
    return kinds


def compare(batched: Service, single: Service, files: list[bytes], texts: list[str], clients: int) -> list[tuple]:
    """Measure both services, and a single client, in turn; return rows (load, quantity, value, unit)."""
    ways = {
        "batched": (batched, clients),
        "a segment at a time": (single, clients),
        "a request at a time": (batched, 1),
    }
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}  # seconds and CPU seconds per request
    for _ in range(ROUNDS):
        for way, (service, count) in ways.items():
            load, cpu = Load(service, files, texts), service.cpu_seconds()
            elapsed = asyncio.run(load.run(["good"] * REQUESTS_PER_ROUND, count))
            cpu = service.cpu_seconds() - cpu
            times[way].append((elapsed / REQUESTS_PER_ROUND, cpu / REQUESTS_PER_ROUND))
            if load.problems:
                raise InputError(f"{len(load.problems)} requests failed, the first with {load.problems[0]}")
            print(f"{way}: {REQUESTS_PER_ROUND / elapsed:.2f} requests per second, {cpu:.1f} CPU seconds")
    return _comparison_rows(times)


def _comparison_rows(times: dict[str, list[tuple[float, float]]]) -> list[tuple]:
    """Return the rows of `compare` for each way, given the seconds and CPU seconds per request in each round."""
    rows: list[tuple] = []
    for way, pairs in times.items():
        wall, cpu = (statistics.median(column) for column in zip(*pairs, strict=True))
        rows += [("recordings", f"requests per second, {way}", 1 / wall, "1/s"),
                 ("recordings", f"CPU time per request, {way}", cpu, "s")]  # fmt: skip
        ratios = [[b / a for a, b in zip(*pair, strict=True)] for pair in zip(times["batched"], pairs, strict=True)]
        if way != "batched":
            speedup, cpu_ratio = (statistics.median(column) for column in zip(*ratios, strict=True))
            rows += [("recordings", f"speedup by batching against {way}", speedup, ""),
                     ("recordings", f"CPU time against batched, {way}", cpu_ratio, "")]  # fmt: skip
    return rows


def stress(service: Service, files: list[bytes], texts: list[str], requests: int, clients: int) -> list[tuple]:
    """Return rows about a mixed load; raise InputError if an answer is wrong or a file is left behind."""
    load = Load(service, files, texts)
    open_before = service.open_files()
    elapsed = asyncio.run(load.run(mixed(requests), clients))
    time.sleep(0.3)  # the service notices the last aborted request
    for (kind, status), number in sorted(load.statuses.items(), key=str):
        print(f"  {kind}: {number} x {status}")
    left = [path.name for path in service.folder.iterdir()]
    if load.problems or left or service.open_files() > open_before:
        first = load.problems[0] if load.problems else left or "open files"
        raise InputError(f"{len(load.problems)} wrong answers; {len(left)} files left; the first: {first}")
    third = len(load.memory) // 3
    percentiles = statistics.quantiles(load.seconds, n=100)
    values = (
        ("requests", requests, ""),
        ("duration", elapsed, "s"),
        ("requests per second", requests / elapsed, "1/s"),
        ("median time of a recording", percentiles[49], "s"),
        ("99th percentile", percentiles[98], "s"),
        ("wrong answers", 0, ""),
        ("memory in the first third", max(load.memory[:third]), "MB"),
        ("memory in the last third", max(load.memory[-third:]), "MB"),
    )
    return [("mixed", *row) for row in values]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder of recordings")
    parser.add_argument(
        "--checkpoint", default=DEFAULT_MODEL, type=current_name, help="run folder, file or released model"
    )
    parser.add_argument("--requests", type=int, default=1000, help="requests of the mixed load (default: 1000)")
    parser.add_argument("--clients", type=int, default=50, help="clients at once (default: 50)")
    parser.add_argument("--record", action="store_true", help=f"append the rows to {FILE.name}")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command; see --help."""
    options = parser().parse_args(argv)
    if options.requests < MIN_REQUESTS:
        raise InputError(f"--requests must be at least {MIN_REQUESTS}; got {options.requests}")
    if options.clients < 1:
        raise InputError(f"--clients must be at least 1; got {options.clients}")
    files = recordings(options.data, REQUESTS_PER_ROUND)
    model = las_fast.load(options.checkpoint)
    texts = [transcript.text for _, transcript in model.transcribe_all(map(io.BytesIO, files), warn=lambda _: None)]
    with started(options.checkpoint) as batched, started(options.checkpoint, "--batch-seconds", "0") as single:
        rows = compare(batched, single, files, texts, options.clients)
        rows += stress(batched, files, texts, options.requests, options.clients)
    for row in rows:
        print(f"{row[0]:<12}{row[1]:<40}{row[2]:.2f} {row[3]}")
    if options.record:
        start = context()
        end = [
            (load, options.checkpoint, options.clients, what, f"{value:.4g}", unit) for load, what, value, unit in rows
        ]
        append_rows(FILE, COLUMNS, [(*start, *row) for row in end])


if __name__ == "__main__":
    run(main)
