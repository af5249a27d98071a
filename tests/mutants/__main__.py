"""The command line of tests.mutants; see the package's docstring, or --help."""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import hashlib
import importlib
import json
import random
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import tests.mutants as package
from tests.mutants.base import BUILD, ROOT, TARGETS, Mutant, Target, Verdict, judged, reason_of

NOTICED = ("noticed", "slow")


def parser() -> argparse.ArgumentParser:
    cli = argparse.ArgumentParser(
        prog="python -m tests.mutants",
        description=package.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cli.add_argument("paths", nargs="*", type=Path, help="files and folders of las_fast, csrc or kernels")
    cli.add_argument("--sample", type=int, metavar="N", help="judge N mutants drawn at random, spread over the files")
    cli.add_argument("--seed", type=int, default=1, help="random seed of the sample (default: 1)")
    cli.add_argument("--jobs", type=int, default=1, help="mutants judged at once (default: 1)")
    cli.add_argument("--out", type=Path, default=BUILD / "results.jsonl", help="results; mutants in it are skipped")
    cli.add_argument("--again", action="store_true", help="judge survivors again, for example after adding tests")
    cli.add_argument("--only", metavar="ID", nargs="+", help="judge only the mutants with these ids")
    cli.add_argument("--budget", type=float, default=60.0, help="CPU seconds of tests per mutant (default: 60)")
    cli.add_argument("--tests", type=Path, nargs="+", default=[], help="judge las_fast by these tests only")
    cli.add_argument("--list", action="store_true", help="list the mutants and judge none")
    cli.add_argument("--report", type=Path, metavar="FILE", help="report on a file of results and judge none")
    return cli


def main(argv: list[str] | None = None) -> None:
    options = parser().parse_args(argv)
    if options.report:
        print("\n".join(report(read(options.report))))
        return
    chosen: list[tuple[Target, Mutant]] = []
    for target in targets_of(options):
        chosen += [(target, mutant) for mutant in target.mutants(options.paths)]
    chosen = select(chosen, options)
    if not chosen:
        raise SystemExit(f"no mutants in {', '.join(map(str, options.paths)) or 'nothing'}; name files or folders of "
                         f"{', '.join(TARGETS)}")  # fmt: skip
    if options.list:
        print("\n".join(str(mutant) for _, mutant in chosen))
        return
    judge_all(chosen, options)
    ids = {mutant.id for _, mutant in chosen}
    print("\n".join(report([row for row in read(options.out) if row["id"] in ids])))


def targets_of(options: argparse.Namespace) -> list[Target]:
    """A Target for each folder that contains, or is contained in, one of the paths."""
    targets = []
    for folder, name in TARGETS.items():
        root = (ROOT / folder).resolve()
        if any(p == root or root in p.parents or p in root.parents for p in (path.resolve() for path in options.paths)):
            module, _, kind = name.partition(":")
            targets.append(getattr(importlib.import_module(module), kind)(budget=options.budget))
            if options.tests:
                targets[-1].restrict(options.tests)
    return targets


def select(chosen: list[tuple[Target, Mutant]], options: argparse.Namespace) -> list[tuple[Target, Mutant]]:
    if options.only:
        return [pair for pair in chosen if pair[1].id in options.only]
    if options.sample is None or options.sample >= len(chosen):
        return chosen
    return stratified(chosen, options.sample, options.seed)


def stratified(chosen: list[tuple[Target, Mutant]], n: int, seed: int) -> list[tuple[Target, Mutant]]:
    """Sample n mutants: from each file in proportion to the number of its mutants, and at least one.

    With fewer samples than files, every mutant is equally likely.
    """
    files: dict[str, list[tuple[Target, Mutant]]] = {}
    for pair in chosen:
        files.setdefault(pair[1].file, []).append(pair)
    # Rank each mutant within its file from 0 to 1, and take the n lowest: the same fraction of every file.
    # Mutants of a file are ordered by a hash, so that changes of other mutants do not change the sample.
    ranked = []
    for pairs in files.values():
        pairs.sort(key=lambda pair: hashlib.sha1(f"{seed} {pair[1].id}".encode()).digest())
        for i, pair in enumerate(pairs):
            drawn = random.Random(f"{seed} {pair[1].id}").random()
            ranked.append((drawn if n < len(files) else (i + drawn * (i > 0)) / len(pairs), pair))
    ranked.sort(key=lambda item: item[0])
    kept = {id(pair) for _, pair in ranked[:n]}
    return [pair for pair in chosen if id(pair) in kept]


# --------------------------------------------------------------------------------------------------------- judging


def judge_all(chosen: Sequence[tuple[Target, Mutant]], options: argparse.Namespace) -> None:
    """Judge the mutants that are not in --out yet, and append a line to it for each."""
    done = {(row["id"], row["source"]): row for row in read(options.out)}
    if options.again:
        done = {key: row for key, row in done.items() if row["outcome"] in NOTICED}
    pending = [(t, m) for t, m in chosen if (m.id, digest(m.file)) not in done]
    random.Random(options.seed).shuffle(pending)  # an interrupted run leaves a fair sample
    print(f"{len(chosen)} mutants, {len(pending)} to judge", file=sys.stderr)
    if not pending:
        return
    targets = {id(target): target for target, _ in pending}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lock = threading.Lock()
    try:
        for target in targets.values():
            target.prepare([m for t, m in pending if t is target], options.jobs)
        with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool, options.out.open("a") as file:
            for n, row in enumerate(pool.map(lambda pair: judged_row(*pair), pending), 1):
                with lock:
                    file.write(json.dumps(row) + "\n")
                    file.flush()
                    mark = "" if row["outcome"] in NOTICED else f"  {row['outcome'].upper()}"
                    place = f"{row['file']}:{row['line']}"
                    print(f"{n}/{len(pending)} {place} {row['seconds']:.1f} s{mark}", file=sys.stderr)
    finally:
        for target in targets.values():
            target.close()


def judged_row(target: Target, mutant: Mutant) -> dict:
    verdict: Verdict = target.judge(mutant)
    row = {"id": mutant.id, "source": digest(mutant.file), **dataclasses.asdict(mutant), **dataclasses.asdict(verdict)}
    return row


def digest(file: str) -> str:
    return hashlib.sha1((ROOT / file).read_bytes()).hexdigest()[:12]


def read(path: Path) -> list[dict]:
    """The rows of a file of results; the last row of each mutant wins."""
    rows = path.read_text().splitlines() if path.exists() else []
    return list({row["id"]: row for row in map(json.loads, rows)}.values())


# ---------------------------------------------------------------------------------------------------------- report


def report(rows: Sequence[dict]) -> Iterator[str]:
    """Yield the fraction noticed by file and folder, then each survivor without a recorded reason."""
    reasons = judged()
    live = [row | {"reason": _reason(row, reasons)} for row in rows if row["outcome"] != "invalid"]
    groups: dict[str, list[dict]] = collections.defaultdict(list)
    for row in live:
        groups[row["file"]].append(row)
    for folder in sorted({row["file"].split("/")[0] for row in live}):
        groups[f"{folder}/ (all)"] = [row for row in live if row["file"].startswith(f"{folder}/")]
    width = max([len(name) for name in groups], default=0)
    yield f"{'':{width}}  mutants  noticed  not run  survived  judged  noticed of live"
    for name, group in sorted(groups.items()):
        yield f"{name:{width}}  {_numbers(group)}"
    yield ""
    for row in sorted(live, key=lambda row: (row["file"], row["line"])):
        if row["outcome"] not in NOTICED and not row["reason"]:
            yield from _survivor(row)


def _reason(row: dict, reasons: dict) -> str:
    if row["outcome"] in NOTICED:
        return ""
    return reason_of(reasons, row["file"], row["function"], row["before"], row["after"])


def _numbers(rows: Sequence[dict]) -> str:
    count = collections.Counter(row["outcome"] for row in rows)
    noticed = sum(count[outcome] for outcome in NOTICED)
    known = sum(bool(row["reason"]) for row in rows)
    live = sum(not row["reason"].startswith(("equivalent", "GPU")) for row in rows)
    share = f"{noticed / len(rows):8.1%} {count['not run']:8} {count['survived']:9} {known:7}"
    return f"{len(rows):7} {share} {noticed / live if live else 1:16.1%}"


def _survivor(row: dict) -> Iterator[str]:
    where = row["function"] or "the module"
    yield f"{row['file']}:{row['line']} in {where}: {row['rule']}, {row['outcome']} [{row['id']}]"
    yield from (f"    - {line.strip()}" for line in row["before"].splitlines())
    yield from (f"    + {line.strip()}" for line in row["after"].splitlines())


if __name__ == "__main__":
    main()
