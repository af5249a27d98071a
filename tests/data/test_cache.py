"""The feature cache is built once per set of inputs, completely or not at all."""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_corpora import RATE, make_archive, make_manifest, make_speech, make_waveform, save, text_array, write_audio

from las_fast import progress
from las_fast.config import DataConfig, FeatureConfig
from las_fast.data import cache as cache_module
from las_fast.data import features as features_module
from las_fast.data import readers
from las_fast.data.cache import cache_folder, open_cache
from las_fast.data.corpus import Utterance
from las_fast.data.dataset import load_dataset
from las_fast.data.layouts import open_corpus
from las_fast.errors import InputError

F23 = FeatureConfig(size=28)


def build_entry(corpus, folder, split="dev-clean", features=F23, **options):
    return open_cache(corpus, split, corpus.utterances(split), features, folder=str(folder), progress=False, **options)


def entries(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.fixture
def corpus(tmp_path):
    return open_corpus(make_archive(tmp_path / "data", "F23"))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


def test_opening_an_entry_again_reads_no_recordings(corpus, folder, monkeypatch):
    first = build_entry(corpus, folder)
    monkeypatch.setattr(cache_module, "read_utterances", lambda *_: pytest.fail("built again"))
    second = build_entry(corpus, folder)
    assert first.ids == second.ids
    assert np.array_equal(first.frames(2), second.frames(2))


def test_frames_in_the_cache_equal_the_frames_of_the_files(corpus, folder):
    entry = build_entry(corpus, folder)
    for i, u in enumerate(corpus.utterances("dev-clean")):
        assert np.array_equal(entry.frames(i), np.load(u.path))


def test_durations_of_archive_features_follow_from_their_frames(corpus, folder):
    entry = build_entry(corpus, folder, features=FeatureConfig(size=28, shift_ms=12.5))
    assert entry.seconds.tolist() == pytest.approx((entry.frame_counts * 0.0125).tolist())
    assert entry.spans == [[]] * 4 and entry.positions.tolist() == [0, 1, 2, 3] and entry.bad == []


def test_the_archive_decides_the_frame_size_not_the_settings(corpus, folder):
    assert build_entry(corpus, folder, features=FeatureConfig(size=80)).frames(0).shape[1] == 28


def test_integer_features_are_read(corpus, folder):
    path = corpus.utterances("dev-clean")[1].path
    np.save(path, np.arange(56, dtype=np.int16).reshape(2, 28))
    assert np.array_equal(build_entry(corpus, folder).frames(1), np.arange(56).reshape(2, 28))


def test_an_entry_records_which_frames_trimming_kept(tmp_path, folder):
    quiet, speech = np.zeros(4 * RATE, np.float32), make_speech(2.0)
    rows = {"plain": [speech], "late": [quiet, speech], "early": [speech, quiet], "twice": [speech, quiet, speech]}
    for name, waves in rows.items():
        write_audio(tmp_path / f"{name}.wav", np.concatenate(waves))
    (tmp_path / "m.tsv").write_text("path\n" + "".join(f"{name}.wav\n" for name in rows))
    plain, late, early, twice = build_entry(open_corpus(tmp_path / "m.tsv"), folder, "all", FeatureConfig()).spans
    assert plain == early == []  # the kept frames are the first of the recording
    assert len(late) == 1 and 340 < late[0][0] < 400 < 500 < late[0][1]
    assert len(twice) == 2 and twice[0][0] == 0


@pytest.mark.parametrize(
    ("spans", "kept"),
    [([(0, 5)], ()), ([(0, 9)], ()), ([(1, 5)], ((1, 5),)), ([(0, 2), (3, 5)], ((0, 2), (3, 5)))],
)
def test_an_untrimmed_recording_has_no_spans(monkeypatch, spans, kept):
    good, bad = readers.Item("good", seconds=1.0), readers.Item("bad", problem="bad")
    waveforms = [np.zeros(800, np.float32)]
    monkeypatch.setattr(features_module, "speech_features", lambda waves, _: [(torch.ones(5, 2), spans) for _ in waves])
    first, second = readers._with_frames([bad, good], waveforms, FeatureConfig())
    assert first is bad and waveforms == []
    assert (second.id, second.seconds, second.spans) == ("good", 1.0, kept) and second.frames.shape == (5, 2)


def test_transposed_archives_are_transposed_back(tmp_path, folder):
    corpus = open_corpus(make_archive(tmp_path / "data", "S25"))
    entry = build_entry(corpus, folder, features=FeatureConfig())
    for i, u in enumerate(corpus.utterances("dev-clean")):
        assert np.array_equal(entry.frames(i), np.load(u.path).T)


def test_a_changed_file_or_setting_makes_a_new_entry(tmp_path, folder):
    corpus = open_corpus(make_manifest(tmp_path / "data"))
    for features in (FeatureConfig(), FeatureConfig(size=40), FeatureConfig(shift_ms=12.5)):
        build_entry(corpus, folder, "dev", features)
    assert len(entries(folder)) == 3
    build_entry(corpus, folder, "dev", FeatureConfig(normalisation="none", deltas=2))  # they come after the cache
    assert len(entries(folder)) == 3
    os.utime(corpus.utterances("dev")[0].path, ns=(1, 1))
    build_entry(corpus, folder, "dev")
    assert len(entries(folder)) == 4


@pytest.mark.parametrize("change", ["size", "time"])
def test_a_changed_transcript_makes_a_new_entry(corpus, folder, change):
    path = corpus.utterances("dev-clean")[1].transcript
    before = path.stat()
    first = build_entry(corpus, folder)
    text = first.texts[1]
    new = text[::-1] if change == "time" else text + " MORE"
    save(path, text_array(new, True))
    if change == "time":
        assert path.stat().st_size == before.st_size
        os.utime(path, ns=(1, 1))
    else:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = build_entry(corpus, folder)
    assert second.texts[1] == new
    assert second.folder != first.folder


def test_a_file_is_identified_by_path_size_and_mtime(tmp_path):
    real = os.path.realpath
    path, stamps = tmp_path / "x", [cache_module._stamp(tmp_path / name, real) for name in ("x", "y")]
    for content, time_ns in ((b"", 0), (b"ab", 0), (b"cd", 1), (b"c", 1)):
        path.write_bytes(content)
        os.utime(path, ns=(0, time_ns))
        stamps.append(cache_module._stamp(path, real))
    assert stamps[-1] == [str(path), 1, 1] and len(set(map(tuple, stamps))) == len(stamps)


def test_an_entry_depends_on_every_input_of_its_frames(corpus, tmp_path, monkeypatch):
    utterances = corpus.utterances("dev-clean")

    def key(corpus=corpus, features=F23, **changes):
        return cache_module._key(corpus, [replace(utterances[0], **changes), *utterances[1:]], features)

    copy, empty = tmp_path / "copy.npy", tmp_path / "empty.npy"
    copy.write_bytes(utterances[0].path.read_bytes())
    facts = utterances[0].path.stat()
    os.utime(copy, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    first = key()
    before = [key(path=empty), key(transcript=empty)]
    empty.touch()
    os.utime(empty, ns=(0, 0))
    keys = [
        first, key(id="x"), key(problem="bad"), key(path=copy), key(transcript="A"), key(transcript="B"),
        key(path=tmp_path / "a.npy"), key(path=tmp_path / "b.npy"), *before, key(path=empty), key(transcript=empty),
        key(replace(corpus, transposed=True)), key(replace(corpus, feature_size=29)),
        key(features=replace(F23, shift_ms=8.0)),
    ]  # fmt: skip
    monkeypatch.setattr(cache_module, "VERSION", 99)
    keys.append(key())
    assert len(set(keys)) == len(keys)
    same = [key(seconds=1.0), key(start=1.0), key(is_part=True)]  # for recordings only
    assert set(same) == {keys[-1]}


def test_only_mfcc_of_recordings_depend_on_the_lifter(corpus):
    def key(kind, features):
        return cache_module._key(replace(corpus, kind=kind), corpus.utterances("dev-clean"), features)

    for kind, features, depends in [("audio", F23, False), ("audio", replace(F23, kind="mfcc"), True),
                                    ("features", replace(F23, kind="mfcc"), False)]:  # fmt: skip
        assert (key(kind, features) != key(kind, replace(features, lifter=0.0))) == depends


def test_the_folder_of_an_entry_is_named_for_its_split(tmp_path, folder, corpus):
    split = "Ä / " + "x" * 60
    entry = open_cache(corpus, split, corpus.utterances("dev-clean"), F23, folder=str(folder), progress=False)
    assert re.fullmatch(rf"-{'x' * 39}-[0-9a-f]{{20}}", entry.folder.name)


@pytest.mark.parametrize(("days", "kept"), [(29.9, True), (30.1, False)])
def test_an_entry_may_be_unused_for_thirty_days(tmp_path, days, kept):
    index = json.dumps({"root": str(tmp_path), "split": "dev"})
    folders = [tmp_path / f"dev-{name}" for name in ("damaged", "new", "old", "other")]
    for folder, text in zip(folders, ("{", index, index, index.replace("dev", "test")), strict=True):
        folder.mkdir()
        (folder / "index.json").write_text(text)
        os.utime(folder / "index.json", (1, time.time() - days * 86400))
    damaged, new, old, other = folders
    cache_module._remove_unused(new, SimpleNamespace(root=tmp_path), "dev")
    assert old.exists() == kept and all(folder.exists() for folder in (damaged, new, other))


@pytest.mark.parametrize(("hours", "kept"), [(47.9, True), (48.1, False)])
def test_an_unfinished_build_of_another_host_is_kept_for_two_days(folder, hours, kept):
    for name in ("x", "dev-clean-abc-another.host-1-12345678", f"dev-{socket.gethostname()}-none-1"):
        (folder / f".building-{name}").mkdir(parents=True)
    (folder / ".building-file").touch()  # not a cache entry
    for path in folder.iterdir():
        os.utime(path, (1, time.time() - hours * 3600))
    cache_module._remove_abandoned(folder)
    assert len(entries(folder)) == (4 if kept else 1)


def abandoned_build(folder):
    """Make the folder of a build by a process of this host that has ended."""
    child = subprocess.Popen(["true"])
    child.wait()
    path = folder / f".building-dev-clean-abc-{socket.gethostname()}-{child.pid}-12345678"
    path.mkdir(parents=True)
    (path / "features.f32").write_bytes(b"half")
    return path


def test_a_locked_build_is_kept_although_its_process_number_is_free_here(folder):
    build = abandoned_build(folder)
    with (build / "features.f32").open("rb") as file:  # a container with the same host name has another process 7
        fcntl.flock(file, fcntl.LOCK_EX)
        os.utime(build, (1, 1))
        cache_module._remove_abandoned(folder)
        assert (build / "features.f32").exists()
    cache_module._remove_abandoned(folder)
    assert entries(folder) == []


def test_another_container_cannot_remove_a_running_build(corpus, folder, monkeypatch):
    whole = cache_module.read_utterances

    def clean_first(*arguments):
        cache_module._remove_abandoned(folder)
        yield from whole(*arguments)

    monkeypatch.setattr(cache_module, "_is_running", lambda pid: False)
    monkeypatch.setattr(cache_module, "read_utterances", clean_first)
    assert len(build_entry(corpus, folder).ids) == 4


def test_a_build_is_not_found_before_it_is_locked(tmp_path, monkeypatch):
    names = []
    monkeypatch.setattr(fcntl, "flock", lambda *_: names.append(entries(tmp_path)))
    with cache_module._locked(tmp_path / "features.f32"):
        assert (names, entries(tmp_path)) == ([["features.new"]], ["features.f32"])


def test_without_locks_a_build_is_kept_for_two_days(corpus, folder, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    build = abandoned_build(folder)
    assert len(build_entry(corpus, folder).ids) == 4 and build.exists()
    os.utime(build, (1, time.time() - 48.1 * 3600))
    cache_module._remove_abandoned(folder)
    assert not build.exists()


def test_a_process_of_another_user_counts_as_running(monkeypatch):
    def kill(pid, number):
        raise PermissionError(f"{pid} {number}")

    assert cache_module._is_running(os.getpid()) is True
    monkeypatch.setattr(os, "kill", kill)
    assert cache_module._is_running(1) is True


def test_a_new_entry_removes_long_unused_ones_of_its_split(corpus, tmp_path, folder):
    other = open_corpus(make_archive(tmp_path / "other", "F23"))
    old, recent = (build_entry(corpus, folder, features=FeatureConfig(size=28, shift_ms=ms)) for ms in (8.0, 9.0))
    other_corpus, split = build_entry(other, folder), build_entry(corpus, folder, "test-clean")
    for entry in (old, recent, other_corpus, split):
        os.utime(entry.folder / "index.json", (1, 1))
    build_entry(corpus, folder, features=FeatureConfig(size=28, shift_ms=9.0))  # marks the entry as used
    new = build_entry(corpus, folder)
    assert entries(folder) == sorted(entry.folder.name for entry in (recent, other_corpus, split, new))


def test_a_new_entry_prints_its_path_and_size_once(corpus, folder, capsys):
    for expected in (1, 0):
        open_cache(corpus, "dev-clean", corpus.utterances("dev-clean"), F23, folder=str(folder))
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("feature cache of dev-clean")]
        assert len(lines) == expected
        assert all(str(folder) in line and line.endswith("MB)") for line in lines)


def test_the_printed_size_is_in_megabytes(corpus, folder, capsys):
    np.save(corpus.utterances("dev-clean")[0].path, np.ones((30_000, 28), np.float32))
    entry = open_cache(corpus, "dev-clean", corpus.utterances("dev-clean"), F23, folder=str(folder))
    size = (entry.folder / "features.f32").stat().st_size
    assert capsys.readouterr().err == f"feature cache of dev-clean: {entry.folder} ({size / 1e6:.1f} MB)\n"


def test_without_progress_nothing_is_printed(corpus, folder, monkeypatch, capsys):
    monkeypatch.setattr(progress, "MIN_SECONDS", 0.0)
    build_entry(corpus, folder)
    assert capsys.readouterr().err == ""


def test_an_entry_that_vanishes_is_an_input_error(corpus, folder, monkeypatch):
    monkeypatch.setattr(cache_module, "_read_entry", lambda target: None)
    with pytest.raises(InputError, match="was removed or damaged while in use; run again"):
        build_entry(corpus, folder)


@pytest.mark.parametrize(
    ("count", "workers", "processes"), [(64, 2, 0), (65, 1, 0), (65, 2, 2), (65, 20, 5), (80, 5, 5), (81, 20, 6)]
)
def test_large_splits_are_read_by_the_requested_processes(corpus, tmp_path, monkeypatch, count, workers, processes):
    children, start = [], readers._start_worker
    monkeypatch.setattr(readers, "_start_worker", lambda task: children.append(start(task)) or children[-1])
    monkeypatch.setattr(cache_module.sys, "executable", "false")  # the workers end at once
    utterances = [Utterance(str(i), Path("x.npy"), None, problem="bad") for i in range(count)]
    items = cache_module.read_utterances(corpus, utterances, F23, tmp_path, workers)
    if processes:
        with pytest.raises(InputError, match=r"ended early \(exit status 1, EOFError .*near x.npy"):
            next(items)
    else:
        assert [item.id for item in items] == [u.id for u in utterances]
    assert len(children) == processes and all(child.returncode is not None for child in children)
    assert list(tmp_path.glob("*.pickle")) == []


def test_a_stopped_build_leaves_no_thread_and_no_descriptor(corpus, tmp_path, monkeypatch):
    children, queues, start, receive = [], [], readers._start_worker, readers._receive
    monkeypatch.setattr(readers, "_start_worker", lambda task: children.append(start(task)) or children[-1])
    monkeypatch.setattr(readers, "_receive", lambda child, results: queues.append(results) or receive(child, results))
    utterances = [Utterance(str(i), Path("x.npy"), None, problem="bad") for i in range(320)]
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    items = readers.read_utterances(corpus, utterances, F23, tmp_path, 2)
    next(items)
    end = time.monotonic() + 60
    while sum(results.full() for results in queues) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    items.close()
    assert len(children) == 2 and all(child.stdout.closed for child in children)
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before


def test_a_cache_is_built_by_as_many_processes_as_there_are_cores(corpus, folder, monkeypatch):
    calls, process = [], cache_module.read_utterances
    monkeypatch.setattr(cache_module, "cores", lambda: 7)
    monkeypatch.setattr(cache_module, "read_utterances", lambda *words: calls.append(words[-1]) or process(*words))
    build_entry(corpus, folder / "1")
    build_entry(corpus, folder / "2", workers=3)
    assert calls == [7, 3]


def test_a_worker_finds_the_package_and_runs_in_its_own_session(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(readers.subprocess, "Popen", lambda command, **options: calls.append((command, options)))
    monkeypatch.setattr(cache_module.sys, "path", ["", "/some/where"])
    monkeypatch.setenv("OF_OURS", "1")
    readers._start_worker(tmp_path / "task")
    ((command, options),) = calls
    assert command == [
        sys.executable,
        "-P",
        "-c",
        "from las_fast.data.readers import run_worker; run_worker()",
        str(tmp_path / "task"),
    ]
    root = str(Path(cache_module.__file__).parents[2])
    expected = {"PYTHONPATH": f"{root}:/some/where", "OMP_NUM_THREADS": "1", "OF_OURS": "1"}
    assert options["env"] | expected == options["env"]
    assert (options["stdout"], options["start_new_session"]) == (subprocess.PIPE, True)


@pytest.mark.parametrize("kind", ["audio", "features"])
def test_a_worker_writes_only_the_items_of_its_chunks(tmp_path, monkeypatch, kind):
    def process(task, chunk):
        os.write(1, b"noise of a library")
        yield from (readers.Item(f"{task[0]} {u}", frames=np.ones((2, 2), np.float32)) for u in chunk)

    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(readers, "_process_chunk", process)
    monkeypatch.setattr(cache_module.sys, "argv", ["-c", str(tmp_path / "task")])
    (tmp_path / "task").write_bytes(pickle.dumps(((kind,), [["a", "b"], ["c"]])))
    with (tmp_path / "out").open("w+b") as out:
        kept = os.dup(1)
        os.dup2(out.fileno(), 1)
        try:
            readers.run_worker()
        finally:
            os.dup2(kept, 1)
            os.close(kept)
        out.seek(0)
        answers = [pickle.load(out), pickle.load(out)]
        assert out.read() == b""
    assert [[item.id for item in answer] for answer in answers] == [[f"{kind} a", f"{kind} b"], [f"{kind} c"]]
    assert threads == ([1] if kind == "audio" else [])


@pytest.mark.parametrize(
    ("stated", "actual", "problem"),
    [
        (None, 9.0, ""), (0.0, 9.0, ""), (2.0, 2.0, ""),
        (2.0, 1.91, ""), (2.0, 1.85, "copy it again"), (0.2, 0.1, ""),  # shorter by 0.1 s
        (10.0, 9.81, ""), (10.0, 9.7, "copy it again"),  # or by 2%, whichever is larger
        (2.0, 3.0, ""), (2.0, 3.5, "add a column 'offset'"),  # longer by 1 s
        (10.0, 11.9, ""), (10.0, 12.5, "add a column 'offset'"),  # or by 20%
    ],
)  # fmt: skip
def test_a_recording_may_differ_slightly_from_the_manifests_duration(stated, actual, problem):
    u = Utterance("x", Path("x.wav"), None, seconds=stated)
    message = readers._duration_problem(u, actual)
    assert (problem in message and f"x.wav lasts {actual:.2f} s" in message) if problem else message == ""
    assert readers._duration_problem(replace(u, is_part=True), actual) == ""


@pytest.mark.parametrize("damage", [b"PK\x03\x04", b"", b"\x93NUMPY\x01\x00\x76\x00{'descr': '<f4', (((("])
def test_worker_processes_report_bad_files_as_bad(tmp_path, folder, monkeypatch, damage):
    monkeypatch.setattr(readers, "MAX_UTTERANCES_IN_PROCESS", 0)
    corpus = open_corpus(make_archive(tmp_path / "data", "F23", utterances=20))
    utterances = corpus.utterances("dev-clean")
    for path in (utterances[3].path, utterances[17].transcript):
        path.write_bytes(damage)
    assert [place for *_, place in build_entry(corpus, folder, workers=2).bad] == [3, 17]


def test_at_most_a_group_of_audio_is_in_memory(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(readers, "MAX_UTTERANCES_IN_PROCESS", 0)
    manifest = make_manifest(tmp_path / "data", utterances=20)
    write_audio(manifest.parent / "audio" / "train-5.wav", make_waveform(np.random.default_rng(0), 3.0))
    manifest.write_text(manifest.read_text().replace("train-5.wav\t0.4", "train-5.wav\t3.0"))
    corpus = open_corpus(manifest)
    plain = build_entry(corpus, folder / "1", "train", FeatureConfig(), workers=1)
    group_seconds = []
    whole = features_module.compute_features

    def watched(waveforms, config):
        group_seconds.append(sum(map(len, waveforms)) / 16000)
        return whole(waveforms, config)

    monkeypatch.setattr(features_module, "compute_features", watched)
    monkeypatch.setattr(readers, "GROUP_SECONDS", 1.5)
    grouped = build_entry(corpus, folder / "2", "train", FeatureConfig(), workers=1)
    assert (
        sorted(group_seconds)[-1] == pytest.approx(3.0) and sorted(group_seconds)[-2] <= 1.5 and len(group_seconds) < 20
    )
    start = subprocess.Popen
    small_answers = "import las_fast.data.readers as readers; readers.MAX_RESULT_BYTES = 1; readers.run_worker()"
    monkeypatch.setattr(
        readers.subprocess, "Popen", lambda c, **options: start([*c[:3], small_answers, *c[4:]], **options)
    )
    for entry in (grouped, build_entry(corpus, folder / "3", "train", FeatureConfig(), workers=2)):
        assert entry.ids == plain.ids
        for i in range(20):
            np.testing.assert_allclose(entry.frames(i), plain.frames(i), atol=1e-3)


def test_recordings_are_converted_in_groups_of_limited_seconds(monkeypatch):
    def with_frames(items, waveforms, features):
        groups.append(([item.seconds for item in items], len(waveforms)))
        waveforms.clear()
        yield from items

    groups, seconds = [], [4.0, 0.0, 6.0, 0.5, 12.0, 3.0, 3.0, 3.0, 2.0]
    monkeypatch.setattr(readers, "GROUP_SECONDS", 10.0)
    monkeypatch.setattr(readers, "_with_frames", with_frames)
    monkeypatch.setattr(
        readers, "_read_recording", lambda s, _: (np.ones(1) if s else None, readers.Item("x", seconds=s))
    )
    assert [item.seconds for item in readers._read_audio(seconds, 80, False, FeatureConfig())] == seconds
    assert groups == [([4.0, 0.0, 6.0], 2), ([0.5], 1), ([12.0], 1), ([3.0, 3.0, 3.0], 3), ([2.0], 1)]


def test_good_utterances_are_stored_in_order_and_bad_ones_listed(tmp_path, monkeypatch):
    def written(check=None):
        notes, counted = [], []
        bar = SimpleNamespace(note=notes.append, update=lambda: counted.append(1))
        times = iter((0.0, 0.0, 0.0, 0.25))
        with monkeypatch.context() as patch:
            patch.setattr(cache_module, "time", SimpleNamespace(monotonic=lambda: next(times)))
            index = cache_module._write_features(tmp_path / "x", iter(items), "uvw", check, bar)
        assert notes == [f"{rate} x real time" for rate in (0, 1000, 4)] and len(counted) == 3
        return index

    frames = np.arange(9, dtype=np.float32).reshape(3, 3)
    bad = readers.Item("b", problem="is bad")
    items = [readers.Item("a", "A", 1.0, frames[:2]), bad, readers.Item("c", "C", 2.0, frames[2:], ((1, 2),))]
    assert written() == {
        "ids": ["a", "c"], "texts": ["A", "C"], "frames": [2, 1], "seconds": [1.0, 2.0], "places": [0, 2],
        "spans": [(), ((1, 2),)], "bad": [("b", "is bad", 1)],
    }  # fmt: skip
    assert np.array_equal(np.fromfile(tmp_path / "x", np.float32), np.arange(9))
    for answer, message in (("", "is bad; or leave"), ("no", "no u A; or leave")):
        with pytest.raises(InputError, match=f"^{message} such utterances out with --on-bad skip$"):
            written(lambda u, text, answer=answer: answer and f"{answer} {u} {text}")


def test_answers_of_a_worker_are_limited_in_bytes(monkeypatch):
    monkeypatch.setattr(readers, "MAX_RESULT_BYTES", 100)
    items = [readers.Item(str(i), frames=np.zeros((n, 1), np.float32)) for i, n in enumerate((10, 10, 50, 10, 20))]
    items.insert(1, readers.Item("bad", problem="bad"))
    groups = list(readers._groups(iter(items)))
    assert [[item.id for item in group] for group in groups] == [["0", "bad", "1"], ["2"], ["3"], ["4"]]


def test_an_invalid_file_name_is_not_reported_as_a_cache_error(tmp_path, folder):
    name = f"audio/{'x' * 300}.wav"
    manifest = make_manifest(tmp_path / "data")
    manifest.write_text(manifest.read_text() + f"x\t{name}\t1\ts\tmade\ttrain\tHI\n")
    corpus = open_corpus(manifest)
    with pytest.raises(InputError, match=r"cannot be opened \(File name too long\)") as error:
        build_entry(corpus, folder, "train", FeatureConfig(), check=lambda *_: "")
    assert name in str(error.value) and "cache" not in str(error.value)
    assert [bad for bad, *_ in build_entry(corpus, folder, "train", FeatureConfig()).bad] == ["x"]


def test_worker_processes_give_what_one_process_gives(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(readers, "MAX_UTTERANCES_IN_PROCESS", 0)
    archive = open_corpus(make_archive(tmp_path / "archive", "F23", utterances=40))
    audio = open_corpus(make_manifest(tmp_path / "audio", utterances=20))
    for corpus, split, features in ((archive, "dev-clean", F23), (audio, "train", FeatureConfig())):
        alone = build_entry(corpus, folder / "1", split, features, workers=1)
        many = build_entry(corpus, folder / "2", split, features, workers=2)
        assert (alone.ids, alone.texts) == (many.ids, many.texts)
        assert sorted(path.name for path in many.folder.iterdir()) == ["features.f32", "index.json"]
        for i in range(len(alone.ids)):
            np.testing.assert_allclose(alone.frames(i), many.frames(i), atol=1e-3)


def test_a_worker_that_dies_is_an_error_not_a_wait(corpus, folder, monkeypatch):
    monkeypatch.setattr(readers, "MAX_UTTERANCES_IN_PROCESS", 0)
    start = subprocess.Popen

    def start_failing(command, **options):
        return start([command[0], "-c", "raise SystemExit(3)"], **options)

    monkeypatch.setattr(readers.subprocess, "Popen", start_failing)
    with pytest.raises(InputError, match=r"ended early \(exit status 3.*its error is above, or remove"):
        build_entry(corpus, folder, workers=2)
    assert entries(folder) == []


def test_a_worker_that_was_killed_needs_memory(corpus, folder, monkeypatch):
    monkeypatch.setattr(readers, "MAX_UTTERANCES_IN_PROCESS", 0)
    start = subprocess.Popen
    killed = "import os; os.kill(os.getpid(), 9)"
    monkeypatch.setattr(readers.subprocess, "Popen", lambda c, **options: start([c[0], "-c", killed], **options))
    with pytest.raises(InputError, match=r"ended early \(SIGKILL, perhaps out of memory, EOFError.*free some memory"):
        build_entry(corpus, folder, workers=2)


def test_a_worker_that_cannot_be_started_is_no_fault_of_the_cache(corpus, folder, monkeypatch):
    def refuse(*_, **options):
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(readers, "MAX_UTTERANCES_IN_PROCESS", 0)
    monkeypatch.setattr(readers.subprocess, "Popen", refuse)
    with pytest.raises(InputError, match="cannot be started .*; free some memory, or raise .*ulimit -u"):
        build_entry(corpus, folder, workers=2)
    assert entries(folder) == []


def test_workers_do_not_import_from_the_current_folder(corpus, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_UTTERANCES_IN_PROCESS", 0)
    (tmp_path / "queue.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # as python -m does
    assert build_entry(corpus, folder, workers=2).ids


def test_a_link_to_another_folder_makes_a_new_entry(tmp_path):
    for version, value in (("1", 1.0), ("2", 2.0)):
        make_archive(tmp_path / version, "F23", utterances=2)
        for path in sorted((tmp_path / version).rglob("mfcc/*.npy")):
            np.save(path, np.full((50, 28), value, np.float32))
            os.utime(path, ns=(10**18, 10**18))
    found = []
    for version in ("1", "2"):
        (tmp_path / "current").unlink(missing_ok=True)
        (tmp_path / "current").symlink_to(tmp_path / version)
        corpus = open_corpus(tmp_path / "current")
        entry = open_cache(corpus, "dev-clean", corpus.utterances("dev-clean"), F23, folder=str(tmp_path / "cache"))
        found.append(float(entry.frames(0)[0, 0]))
    assert found == [1.0, 2.0]


def test_an_interrupt_leaves_no_partial_cache(corpus, folder, monkeypatch):
    read_utterances = cache_module.read_utterances

    def interrupted(*arguments):
        yield next(iter(read_utterances(*arguments)))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "read_utterances", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build_entry(corpus, folder)
    assert entries(folder) == []
    assert len(build_entry(corpus, folder).ids) == 4


def test_a_killed_build_is_removed_and_a_running_one_is_not(corpus, folder):
    child = subprocess.Popen(["true"])
    child.wait()
    folder.mkdir()
    dead = folder / f".building-dev-clean-abc-{socket.gethostname()}-{child.pid}-12345678"
    alive = folder / f".building-dev-clean-abc-{socket.gethostname()}-{os.getpid()}-12345678"
    other_host = folder / ".building-dev-clean-abc-another.host-1-12345678"
    for path in (dead, alive, other_host):
        path.mkdir()
        (path / "features.f32").write_bytes(b"half")
    build_entry(corpus, folder)
    assert not dead.exists() and alive.exists() and other_host.exists()
    os.utime(other_host, (1, 1))
    build_entry(corpus, folder, "test-clean")
    assert not other_host.exists()


def test_two_builders_of_one_entry_do_not_interfere(corpus, folder, monkeypatch):
    whole = cache_module.read_utterances

    def build_after_another(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(cache_module, "read_utterances", whole)
            build_entry(corpus, folder)  # finishes first
        yield from whole(*arguments)

    monkeypatch.setattr(cache_module, "read_utterances", build_after_another)
    assert len(build_entry(corpus, folder).ids) == 4
    assert len(entries(folder)) == 1


def test_a_damaged_entry_is_built_again(corpus, folder):
    build_entry(corpus, folder)
    (folder / entries(folder)[0] / "features.f32").write_bytes(b"short")
    entry = build_entry(corpus, folder)
    assert np.array_equal(entry.frames(0), np.load(corpus.utterances("dev-clean")[0].path))
    assert entries(folder) == [entry.folder.name]
    assert sorted(path.name for path in entry.folder.iterdir()) == ["features.f32", "index.json"]


def test_an_unwritable_cache_is_a_one_sentence_error(corpus, tmp_path, folder, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot be written \(Not a directory\).*XDG_CACHE_HOME.*--data.cache"):
        build_entry(corpus, tmp_path / "file" / "cache")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache_module, "_write_features", full)
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)"):
        build_entry(corpus, folder)
    assert entries(folder) == []
    monkeypatch.setattr(cache_module, "_write_features", lambda *_: (_ for _ in ()).throw(TimeoutError()))
    with pytest.raises(InputError, match=r"cannot be written \(TimeoutError\)"):
        build_entry(corpus, folder)


def test_the_cache_folder_comes_from_the_setting_or_the_system(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("") == tmp_path / "las_fast"
    assert cache_folder("/elsewhere").as_posix() == "/elsewhere"
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "~/.other")
    assert cache_folder("").as_posix() == "/home/someone/.other/las_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("") == tmp_path / ".cache" / "las_fast"


def test_without_a_home_folder_the_error_says_what_to_set(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # no HOME and no passwd entry
    with pytest.raises(InputError, match="no home folder is known; set XDG_CACHE_HOME to a writable folder"):
        cache_folder("")
    with pytest.raises(InputError, match="~/x: the home folder of this user is not known; write the path without ~"):
        cache_folder("~/x")
    with pytest.raises(InputError, match="~nosuch/x: the home folder of nosuch is not known"):
        open_corpus("~nosuch/x")


def test_an_entry_can_be_sent_to_another_process(corpus, folder, monkeypatch):
    monkeypatch.setattr(cache_module, "DROP_BYTES", 1)  # release the map's pages after every read
    entry = build_entry(corpus, folder)
    entry.frames(0)
    copy = pickle.loads(pickle.dumps(entry))
    assert all(np.array_equal(copy.frames(i), entry.frames(i)) for i in range(4))


def test_mapped_pages_are_released_after_drop_bytes(tmp_path, monkeypatch):
    class Map(mmap.mmap):
        def madvise(self, option):
            assert option == mmap.MADV_DONTNEED
            released.append(len(read))

    released, read, stored = [], [], np.arange(40 * 28, dtype=np.float32).reshape(40, 28)
    stored.tofile(tmp_path / "features.f32")
    entry = cache_module.CacheEntry(
        folder=tmp_path, size=28, ids=list("abcd"), texts=[None] * 4, frame_counts=np.array([10, 10, 5, 15]),
        seconds=np.ones(4), positions=np.arange(4), spans=[[]] * 4, bad=[],
    )  # fmt: skip
    monkeypatch.setattr(cache_module.mmap, "mmap", Map)
    monkeypatch.setattr(cache_module, "DROP_BYTES", 20 * 28 * 4)
    for i, first, end in ((0, 0, 10), (1, 10, 20), (2, 20, 25), (3, 25, 40), (2, 20, 25), (0, 0, 10), (1, 10, 20)):
        read.append(i)
        assert np.array_equal(entry.frames(i), stored[first:end])
    assert released == [3, 6]


def damage_file(path, kind):
    """Damage a feature file."""
    good = np.load(path)
    if kind == "nan":
        good[3, 4] = np.nan
    elif kind == "infinite":
        good[0, 0] = -np.inf
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-20])
    elif kind == "empty file":
        path.write_bytes(b"")
    elif kind == "pickled":
        np.save(path, np.array([good, None], object), allow_pickle=True)
    elif kind == "zipped":
        with path.open("wb") as file:
            np.savez(file, good)
    else:
        changed = {
            "no frames": good[:0],
            "one-dimensional": good[0],
            "letters": good.astype(str),
            "narrow": good[:, :5],
            "too large": good.astype(np.float64) * 1e300,
        }
        np.save(path, changed.get(kind, good))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("nan", "NaN"),
        ("infinite", "infinite"),
        ("too large", "infinite"),
        ("truncated", "truncated"),
        ("empty file", "truncated"),
        ("pickled", "pickle"),
        ("zipped", "archive of arrays"),
        ("no frames", "no frames"),
        ("one-dimensional", r"shape \(frames, 28\); got float32 \(28,\)"),
        ("letters", "must have numbers"),
        ("narrow", r"got \(\d+, 5\)"),
    ],
)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_bad_features_are_reported_or_skipped_and_counted(corpus, tmp_path, folder, capsys, kind, reason):
    bad = corpus.utterances("dev-clean")[1]
    damage_file(bad.path, kind)

    def load(on_bad):
        data = DataConfig(cache=str(folder), on_bad=on_bad)
        return load_dataset(corpus, ("dev-clean",), features=F23, data=data, need_text=True, progress=False)

    with pytest.raises(InputError, match=reason) as error:
        load("error")
    assert str(bad.path) in str(error.value) and "\n" not in str(error.value)
    assert entries(folder) == []
    dataset = load("skip")
    assert len(dataset) == 3 and bad.id not in dataset.ids
    assert [name for name, _ in dataset.skipped] == [bad.id]
    assert dataset.positions.tolist() == [0, 2, 3]
    assert "left out 1 of 4" in capsys.readouterr().err
    with pytest.raises(InputError, match=reason):  # also from the cache
        load("error")


@pytest.mark.parametrize("missing", ["features", "transcript"])
def test_features_without_a_transcript_and_the_reverse_are_reported(corpus, folder, missing):
    lost = corpus.utterances("dev-clean")[2]
    (lost.path if missing == "features" else lost.transcript).unlink()
    for on_bad in ("error", "skip"):
        data = DataConfig(cache=str(folder), on_bad=on_bad)
        if on_bad == "error":
            with pytest.raises(InputError, match=f"has no {missing}") as error:
                load_dataset(corpus, ("dev-clean",), features=F23, data=data, need_text=True, progress=False)
            assert str(lost.path) in str(error.value)
        else:
            kept = load_dataset(corpus, ("dev-clean",), features=F23, data=data, need_text=True, progress=False)
            assert lost.id not in kept.ids and len(kept.skipped) == 1


def test_a_missing_feature_file_of_a_manifest_does_not_blame_a_transcript(tmp_path, folder):
    save(tmp_path / "x.npy", np.ones((30, 17), np.float32))
    (tmp_path / "m.tsv").write_text("path\ttext\nx.npy\tHI\ny.npy\tHI\n")
    entry = build_entry(open_corpus(tmp_path), folder, "all", FeatureConfig(size=17))
    assert entry.bad == [("y", f"{tmp_path}/y.npy is not a feature file: it does not exist; copy it again or remove "
                               "its counterpart", 1)]  # fmt: skip


def test_an_error_names_the_shape_of_a_transposed_archive_as_stored(tmp_path, folder):
    corpus = open_corpus(make_archive(tmp_path / "data", "S25"))
    first, second = (u.path for u in corpus.utterances("dev-clean")[:2])
    np.save(first, np.load(first)[:70])
    np.save(second, np.ones((1, 2, 3)))
    one, other = (problem for _, problem, _ in build_entry(corpus, folder, features=FeatureConfig()).bad)
    assert f"{first} must have shape (80, frames) like the other files; got (70, " in one
    assert other == f"{second} must have numbers of shape (80, frames); got float64 (1, 2, 3); create it again"


def test_a_damaged_transcript_is_reported(corpus, folder):
    path = corpus.utterances("dev-clean")[0].transcript
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match="truncated") as error:
        build_entry(corpus, folder, check=lambda *_: "")
    assert str(path) in str(error.value)


def unreadable(monkeypatch, reasons):
    """Let the recordings of some utterances be unreadable for reasons outside their files; return the ids read."""
    read, whole = [], readers._read_recording

    def read_recording(u, rate):
        read.append(u.id)
        return (None, readers.Item(u.id, problem=reasons[u.id])) if u.id in reasons else whole(u, rate)

    monkeypatch.setattr(readers, "_read_recording", read_recording)
    return read


def test_a_bad_recording_that_is_readable_now_is_no_longer_left_out(tmp_path, folder, monkeypatch):
    corpus = open_corpus(make_manifest(tmp_path / "data"))
    ids = [u.id for u in corpus.utterances("train")]
    reasons = {ids[0]: "needs PyAV", ids[2]: "needs PyAV"}
    read = unreadable(monkeypatch, reasons)
    first = build_entry(corpus, folder, "train", FeatureConfig())
    del read[:], reasons[ids[0]]  # pip install av helps one of them
    second = build_entry(corpus, folder, "train", FeatureConfig())
    assert second.bad == [(ids[2], "needs PyAV", 2)] and second.ids == [ids[0], ids[1], ids[3]]
    assert read == [ids[0], *ids]  # one that is good is enough to build again
    assert second.folder.name == f"{first.folder.name}.1"
    expected = build_entry(corpus, tmp_path / "other", "train", FeatureConfig()).frames(1)
    assert np.array_equal(first.frames(0), expected)  # a running command still reads the earlier entry
    del reasons[ids[2]]
    third = build_entry(corpus, folder, "train", FeatureConfig())
    assert third.bad == [] and third.ids == ids and third.folder.name == f"{first.folder.name}.2"
    read.clear()
    assert build_entry(corpus, folder, "train", FeatureConfig()).folder == third.folder and read == []


def test_only_bad_recordings_are_read_again_and_their_present_reason_is_given(tmp_path, folder, monkeypatch):
    corpus = open_corpus(make_manifest(tmp_path / "data"))
    one, two = (u.id for u in corpus.utterances("train")[:2])
    reasons = {one: "no permission", two: "no permission"}
    read = unreadable(monkeypatch, reasons)
    build_entry(corpus, folder, "train", FeatureConfig())
    read.clear()
    reasons[two] = "is damaged"
    entry = build_entry(corpus, folder, "train", FeatureConfig())
    assert entry.bad == [(one, "no permission", 0), (two, "is damaged", 1)] and read == [one, two]
    read.clear()
    with pytest.raises(InputError, match="^no permission; or leave such utterances out"):
        build_entry(corpus, folder, "train", FeatureConfig(), check=lambda *_: "")
    assert read == [one]
    del reasons[one]
    with pytest.raises(InputError, match="^is damaged; or leave such utterances out"):
        build_entry(corpus, folder, "train", FeatureConfig(), check=lambda *_: "")
    assert entries(folder) == [entry.folder.name]  # nothing was built in vain
    del reasons[two]
    assert build_entry(corpus, folder, "train", FeatureConfig(), check=lambda *_: "").bad == []


def test_bad_recordings_are_reported_or_skipped(tmp_path, folder):
    manifest = make_manifest(tmp_path / "data")
    corpus = open_corpus(manifest)
    bad = corpus.utterances("train")[1].path
    bad.write_bytes(b"no audio at all")
    with pytest.raises(InputError, match="cannot be read as audio") as error:
        build_entry(corpus, folder, "train", FeatureConfig(), check=lambda *_: "")
    assert str(bad) in str(error.value)
    assert [name for name, *_ in build_entry(corpus, folder, "train", FeatureConfig()).bad] == ["train-1"]


def test_a_bad_text_is_refused_before_any_recording_is_read(tmp_path, folder, monkeypatch):
    manifest = make_manifest(tmp_path / "data")
    manifest.write_text(manifest.read_text() + "x\taudio/x.wav\t1\ts\tmade\ttrain\tHÉLLO\n")
    monkeypatch.setattr(cache_module, "read_utterances", lambda *_: pytest.fail("recordings were read"))
    with pytest.raises(InputError, match="vocabulary: 'É'; map them with --data.normalise-text True"):
        load_dataset(
            open_corpus(manifest),
            ("train",),
            features=FeatureConfig(),
            data=DataConfig(cache=str(folder)),
            need_text=True,
            progress=False,
        )


def test_the_first_bad_text_of_an_archive_ends_the_build(corpus, folder):
    path = corpus.utterances("dev-clean")[1].transcript
    save(path, text_array("lower", True))
    with pytest.raises(InputError, match="outside the vocabulary") as error:
        load_dataset(
            corpus, ("dev-clean",), features=F23, data=DataConfig(cache=str(folder)), need_text=True, progress=False
        )
    assert str(path) in str(error.value)
    assert entries(folder) == []


def test_progress_shows_the_real_time_factor(corpus, folder, monkeypatch, capsys):
    monkeypatch.setattr(progress, "MIN_SECONDS", 0.0)
    utterances = corpus.utterances("dev-clean")
    open_cache(corpus, "dev-clean", utterances, F23, folder=str(folder), progress=True)
    line = capsys.readouterr().err.splitlines()[1]
    assert line.startswith(f"reading dev-clean: 50% (2 of {len(utterances)} utterances), ")
    assert re.search(r"; [1-9]\d* x real time$", line)


def test_an_answer_of_a_worker_holds_as_many_utterances_as_fit(monkeypatch):
    monkeypatch.setattr(readers, "MAX_RESULT_BYTES", 100)
    sizes = [40, 60, 1, 100, 101, 0, 100, 0, 1]
    items = [readers.Item(str(n), frames=np.zeros(n, np.int8) if n else None) for n in sizes]
    groups = [[int(item.id) for item in group] for group in readers._groups(iter(items))]
    assert groups == [[40, 60], [1], [100], [101], [0, 100, 0], [1]]
    assert list(readers._groups(iter([]))) == []
