"""Transcribe an interview made of utterances; measure its CER, subtitles, time and memory.

    python -m benchmarks.interview --data ROOT [--minutes 10] [--seed 0] [--vad silero] [--record]

Utterances of several speakers, all at one level, follow each other with pauses of 0.3 to 1.5 s, in noise at -56 dB. The
CER is compared with that of the same recording cut at the true boundaries.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import soundfile

import las_fast
from benchmarks.rows import CONTEXT, RESULTS, append_rows, context
from benchmarks.splits import add_split_options, utterances_of
from las_fast.cli import run
from las_fast.config import VADS
from las_fast.data.audio import load_utterance
from las_fast.data.corpus import Utterance
from las_fast.errors import InputError
from las_fast.files import DEFAULT_MODEL
from las_fast.output.metrics import score
from las_fast.output.subtitles import MAX_PAUSE, MAX_SECONDS, MIN_SECONDS, Cue, SubtitleSize, make_cues
from las_fast.output.transcripts import Word

FILE = RESULTS / "interview.csv"
COLUMNS = (*CONTEXT, "checkpoint", "minutes", "seed", "vad", "utterances", "cer", "cer_true_boundaries", "cues",
           "broken_rules", "utterances_per_cue", "seconds", "cpu_seconds", "peak_mib")  # fmt: skip
RATE = 16000  # Hz
LEVEL, NOISE = 0.06, 10 ** (-56 / 20)  # root mean square of the speech; standard deviation of the noise
PAUSE = (0.3, 1.5)  # seconds
TOLERANCE = 1e-6  # seconds
MAX_MINUTES = 600  # ten hours are 2.3 GB of samples
# Runs transcribe, then prints its CPU seconds and peak memory in KiB; resource.getrusage would include this process.
PROGRAM = """
import re, sys, time
from las_fast.cli import run
from las_fast.transcribe import main
run(main, sys.argv[1:])
print(time.process_time(), re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
"""


def make_interview(utterances: list[Utterance], seconds: float, seed: int) -> tuple[np.ndarray, list[tuple]]:
    """Return samples (N,) float32 at RATE, at least `seconds` long, and (start, end, text) of each utterance.

    Each utterance is used once before any is used again.
    """
    rng = np.random.default_rng(seed)
    parts, bounds, length = [np.zeros(RATE, np.float32)], [], 1.0  # length in seconds
    while length < seconds:
        for i in rng.permutation(len(utterances)):
            speech = load_utterance(utterances[i], RATE)
            pause = int(rng.uniform(*PAUSE) * RATE)
            bounds.append((length, length + len(speech) / RATE, utterances[i].transcript))
            parts += [speech * (LEVEL / np.sqrt(np.mean(speech**2))), np.zeros(pause, np.float32)]
            length += (len(speech) + pause) / RATE
            if length >= seconds:
                break
    samples = np.concatenate(parts)
    return samples + (NOISE * rng.standard_normal(len(samples))).astype(np.float32), bounds


def broken_rules(cues: list[Cue], size: SubtitleSize | None = None) -> Iterator[str]:
    """Yield a sentence for each place where subtitles break a rule of las_fast.output.subtitles."""
    size = size or SubtitleSize()
    for cue in cues:
        lines = cue.text.split("\n")
        if len(lines) > size.lines or max(map(len, lines)) > size.width:
            yield f"{cue.text!r} is not {size.lines} lines of {size.width} characters"
        if cue.end - cue.start > MAX_SECONDS + TOLERANCE:
            yield f"{cue.text!r} is shown for {cue.end - cue.start:.2f} s"
        for a, b in pairwise(word for line in cue.lines for word in line):
            if b.start - a.end > MAX_PAUSE + TOLERANCE:
                yield f"{cue.text!r} has a pause of {b.start - a.end:.2f} s in it"
    for a, b in pairwise(cues):
        if a.end > b.start + TOLERANCE:
            yield f"{a.text!r} and {b.text!r} overlap"
    for i, cue in enumerate(cues):
        before = cues[i - 1].end if i else 0.0
        after = cues[i + 1].start if i + 1 < len(cues) else float("inf")
        has_room = cue.start > before + TOLERANCE or cue.end < after - TOLERANCE
        if cue.end - cue.start < MIN_SECONDS - TOLERANCE and has_room:
            yield f"{cue.text!r} is shown for {cue.end - cue.start:.2f} s, although there is time"


def utterances_per_cue(cues: list[Cue], bounds: list[tuple]) -> int:
    """Return the maximum over cues of the number of utterances whose middle the cue covers."""
    middles = [(start + end) / 2 for start, end, _ in bounds]
    return max((sum(cue.start < middle < cue.end for middle in middles) for cue in cues), default=0)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.interview", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add_split_options(parser, FILE, checkpoint=DEFAULT_MODEL)
    parser.add_argument("--source", default="librispeech", help="text in the paths of the utterances to use")
    parser.add_argument("--minutes", type=float, default=10, help="minimum duration of the interview (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the order and the pauses (default: 0)")
    parser.add_argument("--vad", choices=VADS, default="energy", help="how speech is found (default: energy)")
    parser.add_argument("--skip-boundaries", action="store_true", help="do not measure the CER with true boundaries")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command; see --help."""
    options = parser().parse_args(argv)
    if not 0.1 <= options.minutes <= MAX_MINUTES:
        raise InputError(f"--minutes must be from 0.1 to {MAX_MINUTES}; got {options.minutes:g}")
    utterances = [u for u in utterances_of(options.data, options.split) if options.source in str(u.path)]
    if not utterances:
        raise InputError(f"no path of --split {options.split} contains {options.source!r}; give another --source")
    samples, bounds = make_interview(utterances, options.minutes * 60, options.seed)
    row = measure(samples, bounds, options)
    print("\n".join(f"{name:20} {value}" for name, value in row.items()))
    if options.record:
        append_rows(FILE, COLUMNS, [(*context(), *row.values())])


def measure(samples: np.ndarray, bounds: list[tuple], options: argparse.Namespace) -> dict:
    """Transcribe the interview with the command, and each of its utterances separately; return a row."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "interview.wav")
        soundfile.write(path, samples, RATE)
        begin = time.perf_counter()
        transcript, cpu, peak = transcribe(path, options.checkpoint, options.vad)
        seconds = time.perf_counter() - begin
    reference = " ".join(text for *_, text in bounds)
    words = [Word(w["word"], w["start"], w["end"], w["confidence"]) for s in transcript["segments"] for w in s["words"]]
    cues = make_cues(words)
    problems = list(broken_rules(cues))
    for problem in problems:
        print(problem)
    cut = None if options.skip_boundaries else cut_at_boundaries(samples, bounds, options.checkpoint)
    return {
        "checkpoint": options.checkpoint, "minutes": options.minutes, "seed": options.seed, "vad": options.vad,
        "utterances": len(bounds),
        "cer": round(score([reference], [transcript["text"]]).cer, 2),
        "cer_true_boundaries": "" if cut is None else round(score([reference], [cut]).cer, 2),
        "cues": len(cues), "broken_rules": len(problems), "utterances_per_cue": utterances_per_cue(cues, bounds),
        "seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1), "peak_mib": peak,
    }  # fmt: skip


def transcribe(path: Path, checkpoint: str, vad: str = "energy") -> tuple[dict, float, int]:
    """Transcribe a recording in a new process; return its JSON, CPU seconds and peak resident memory in MiB."""
    arguments = [str(path), "--checkpoint", checkpoint, "--format", "json", "--vad", vad]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise InputError(f"transcribe failed with exit status {done.returncode}; its error is above")
    row, measured = done.stdout.splitlines()
    cpu, peak = measured.split()
    return json.loads(row), float(cpu), int(peak) // 1024


def cut_at_boundaries(samples: np.ndarray, bounds: list[tuple], checkpoint: str) -> str:
    """Return the text of the interview's utterances, each transcribed as a recording of its own."""
    parts = [samples[int(start * RATE) : int(end * RATE)] for start, end, _ in bounds]
    transcripts = las_fast.load(checkpoint).transcribe_all(parts, RATE, warn=lambda message: None)
    return " ".join(transcript.text for _, transcript in transcripts if transcript.text)


if __name__ == "__main__":
    run(main)
