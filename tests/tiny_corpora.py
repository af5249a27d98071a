"""Write tiny corpora of every layout: HW4P2 editions, LibriSpeech, manifests, Common Voice, Kaldi, audio folders."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

RATE = 16000
LETTERS = list("ABCDEFGHIJKLMNOPQRSTUVWXYZ'")
LIBRISPEECH_SPLITS = ("train-clean-100", "train-clean-360", "dev-clean", "test-clean")


@dataclass(frozen=True)
class Layout:
    root: str
    splits: tuple[str, ...]  # the last is the test split
    size: int
    features: str = "mfcc"
    transcripts: str = "transcripts"
    stored_ends: bool = True  # transcripts include <sos> and <eos>
    header: tuple[str, str] = ("index", "label")
    name: str = ""


_CLEAN = ("train-clean-100", "dev-clean", "test-clean")
EDITIONS = {
    "S22": Layout(
        "hw4p2_student_data/hw4p2_student_data",
        ("train", "dev", "test"),
        13,
        transcripts="transcript",
        header=("id", "predictions"),
        name="HW4P2 S22",
    ),
    "F22": Layout("hw4p2", _CLEAN, 15, transcripts="transcript/raw", header=("id", "label"), name="HW4P2 F22"),
    "S23": Layout("data", _CLEAN, 27, name="HW4P2 S23"),
    "F23": Layout(
        "11-785-f23-hw4p2", ("train-clean-100", "train-clean-360", "dev-clean", "test-clean"), 28, name="HW4P2 F23"
    ),
    "S24": Layout("11-785s24-hw4p2", ("train-clean-50", *_CLEAN), 27, name="HW4P2 S24"),
    "F24": Layout(
        "11-785-f24-hw4p2",
        _CLEAN,
        80,
        features="fbank",
        transcripts="text",
        stored_ends=False,
        header=("Index", "Labels"),
        name="HW4P2 F24",
    ),
    "S25": Layout(
        "hw4p2_data",
        _CLEAN,
        80,
        features="fbank",
        transcripts="text",
        stored_ends=False,
        header=("id", "transcription"),
        name="HW4P2 S25/F25",
    ),
}


def make_archive(root: str | Path, edition: str, *, utterances: int | Mapping[str, int] = 4, seed: int = 0) -> Path:
    """Write an HW4P2 archive of an edition (a key of EDITIONS) below root and return the archive's folder.

    utterances: number per split, or by split name. Recordings have 20 to 60 frames, transcripts 4 to 12 characters; the
    test split has no transcripts. Names are LibriSpeech ids; in S22 the test order differs from their sorted order.
    """
    layout = EDITIONS[edition]
    archive = Path(root) / layout.root
    generator = np.random.default_rng(seed)
    for number, split in enumerate(layout.splits):
        count = utterances if isinstance(utterances, int) else utterances.get(split, 4)
        names = [f"{1089 + 31 * number + i // 3}-{134686 + number}-{i % 3:04d}" for i in range(count)]
        for name in names:
            features, text = make_features(generator, layout), make_text(generator)
            save(archive / split / layout.features / f"{name}.npy", features)
            if split != layout.splits[-1]:
                save(archive / split / layout.transcripts / f"{name}.npy", text_array(text, layout.stored_ends))
        if edition == "S22" and split == "test":
            order = generator.permutation(names)
            _write_rows(archive / split / "test_order.csv", [["file"], *([f"{name}.npy"] for name in order)])
    if layout.features == "fbank":
        _write_extras(archive, edition)
    return archive


def make_features(generator: np.random.Generator, layout: Layout) -> np.ndarray:
    """One recording: (T, F) float32, or (F, T) in dB from -80 to 0 for fbank."""
    frames = int(generator.integers(20, 61))
    if layout.features == "fbank":
        return generator.uniform(-80, 0, (layout.size, frames)).astype(np.float32)
    return generator.normal(size=(frames, layout.size)).astype(np.float32) * 3 + 1


def make_text(generator: np.random.Generator) -> str:
    words = ["".join(generator.choice(LETTERS, int(generator.integers(1, 4)))) for _ in range(3)]
    return " ".join(["A" + words[0], *words[1:]])


def text_array(text: str, stored_ends: bool) -> np.ndarray:
    return np.array(["<sos>", *text, "<eos>"] if stored_ends else list(text))


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)
    return path


def make_librispeech(root: str | Path, *, utterances: int = 3, seed: int = 0, splits=LIBRISPEECH_SPLITS) -> Path:
    """Write root/LibriSpeech/SPLIT/SPEAKER/CHAPTER/*.flac with transcripts; return root."""
    generator = np.random.default_rng(seed)
    for number, split in enumerate(splits):
        for speaker in (1089 + number, 121 + number):
            chapter = Path(root) / "LibriSpeech" / split / str(speaker) / "134686"
            lines = []
            for i in range(utterances):
                name = f"{speaker}-134686-{i:04d}"
                write_audio(chapter / f"{name}.flac", make_waveform(generator))
                lines.append(f"{name} {make_text(generator)}\n")
            (chapter / f"{speaker}-134686.trans.txt").write_text("".join(lines), encoding="utf-8")
    return Path(root)


def make_manifest(
    root: str | Path, *, suffix: str = ".tsv", utterances: int = 4, seed: int = 0, split: bool = True
) -> Path:
    """Write recordings and a manifest (.tsv or .jsonl), with splits train and dev or none; return its path."""
    generator = np.random.default_rng(seed)
    rows = []
    for name in ("train", "dev") if split else ("x",):
        for i in range(utterances):
            path = f"audio/{name}-{i}.wav"
            write_audio(Path(root) / path, make_waveform(generator))
            row = {"id": f"{name}-{i}", "path": path, "seconds": "0.4", "speaker": "s", "source": "made"}
            rows.append(row | ({"split": name} if split else {}) | {"transcript": make_text(generator)})
    path = Path(root) / f"manifest{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        lines = [list(rows[0]), *(list(row.values()) for row in rows)]
        path.write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")
    return path


def make_waveform(generator: np.random.Generator, seconds: float | None = None) -> np.ndarray:
    """A rising tone with noise, (N,) float32 at 16 kHz."""
    n = int(RATE * (seconds or generator.uniform(0.25, 0.6)))
    t = np.arange(n) / RATE
    glide = np.sin(2 * np.pi * (generator.uniform(150, 900) + 300 * t) * t)
    return (0.3 * glide + 0.03 * generator.normal(size=n)).astype(np.float32)


def make_speech(seconds: float, *, rate: int = RATE, seed: int = 0) -> np.ndarray:
    """A signal with the loudness pattern of speech, (N,) float32: voiced syllables over faint noise."""
    generator = np.random.default_rng(seed)
    t = np.arange(int(rate * seconds)) / rate
    pitch = 2 * np.pi * np.cumsum(generator.uniform(100, 150) + 20 * np.sin(2 * np.pi * 0.7 * t)) / rate
    voice = sum(np.sin(k * pitch) / k for k in range(1, 12))
    syllables = np.clip(np.sin(2 * np.pi * 3.5 * t + generator.uniform(0, 6)), 0, None) ** 0.5
    return (0.1 * voice * syllables + 1e-3 * generator.normal(size=len(t))).astype(np.float32)


def make_music(seconds: float) -> np.ndarray:
    """Chords that change every 0.3 s, (N,) float32 at RATE: as loud as speech, but no speech."""
    t = np.arange(int(seconds * RATE)) / RATE
    base = 220 * 2 ** (np.random.default_rng(5).integers(0, 12, 1 + int(seconds / 0.3)) / 12)
    pitch = 2 * np.pi * np.cumsum(base[(t / 0.3).astype(int)]) / RATE
    chord = sum(np.sin(k * pitch) for k in (1, 1.25, 1.5))
    return (0.1 * chord * np.exp(-3 * (t % 0.3))).astype(np.float32)


def write_audio(path: Path, waveform: np.ndarray, rate: int = RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, waveform, rate)
    return path


def _write_extras(archive: Path, edition: str) -> None:
    if edition == "F24":
        save(archive / "text-for-LM" / "0.npy", np.array(list("SOME TEXT")))
    else:
        symbols = [" ", "'", "<pad>", "<sos/eos>", "<unk>", *LETTERS[:-1]]
        (archive / "char_set.txt").write_text("\n".join(symbols) + "\n", encoding="utf-8")


def _write_rows(path: Path, rows: list[list[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def make_common_voice(root: str | Path, *, utterances: int = 2, seed: int = 0) -> Path:
    """Write root/clips/*.wav with train.tsv, dev.tsv, test.tsv and validated.tsv; return root."""
    generator = np.random.default_rng(seed)
    header = "client_id path sentence_id sentence sentence_domain up_votes down_votes age gender accents variant locale"
    everything = []
    for split in ("train", "dev", "test", "validated"):
        rows = everything if split == "validated" else []
        for i in range(0 if split == "validated" else utterances):
            name = f"common_voice_en_{split}{i}.wav"
            write_audio(Path(root) / "clips" / name, make_waveform(generator))
            rows.append(f"c0\t{name}\ts{i}\t{make_text(generator)}\t\t2\t{i % 2}\t\t\t\t\ten\n")
        everything += [] if split == "validated" else rows
        (Path(root) / f"{split}.tsv").write_text(header.replace(" ", "\t") + "\n" + "".join(rows), encoding="utf-8")
    (Path(root) / "clip_durations.tsv").write_text("clip\tduration[ms]\n", encoding="utf-8")
    return Path(root)


def make_kaldi(root: str | Path, *, splits=("train", "dev"), recordings: int = 2, seed: int = 0) -> Path:
    """Write root/data/SPLIT/{wav.scp,text,segments,utt2spk}: each recording has two segments; return root/data.

    Paths in wav.scp are relative to root, as Kaldi's scripts leave them.
    """
    generator = np.random.default_rng(seed)
    for split in splits:
        lines: dict[str, list[str]] = {"wav.scp": [], "text": [], "segments": [], "utt2spk": []}
        for i in range(recordings):
            name = f"{split}{i}"
            write_audio(Path(root) / "wav" / f"{name}.wav", make_waveform(generator, 1.0))
            lines["wav.scp"].append(f"{name} wav/{name}.wav")
            for k, (start, end) in enumerate(((0.1, 0.4), (0.5, 0.95))):
                lines["segments"].append(f"{name}-{k} {name} {start} {end}")
                lines["text"].append(f"{name}-{k} {make_text(generator)}")
                lines["utt2spk"].append(f"{name}-{k} s{i}")
        folder = Path(root) / "data" / split
        folder.mkdir(parents=True)
        for name, content in lines.items():
            (folder / name).write_text("\n".join(content) + "\n", encoding="utf-8")
    return Path(root) / "data"


def make_audio_folder(
    root: str | Path, *, splits=("train", "validation"), suffix: str = ".csv", utterances: int = 2, seed: int = 0
) -> Path:
    """Write root/SPLIT/*.wav with metadata.csv or metadata.jsonl in each split's folder; return root."""
    generator = np.random.default_rng(seed)
    for split in splits:
        rows = []
        for i in range(utterances):
            write_audio(Path(root) / split / f"{split}-{i}.wav", make_waveform(generator))
            rows.append({"file_name": f"{split}-{i}.wav", "transcription": make_text(generator)})
        if suffix == ".jsonl":
            text = "".join(json.dumps(row) + "\n" for row in rows)
        else:
            text = "file_name,transcription\n" + "".join(f'{r["file_name"]},"{r["transcription"]}"\n' for r in rows)
        (Path(root) / split / f"metadata{suffix}").write_text(text, encoding="utf-8")
    return Path(root)
