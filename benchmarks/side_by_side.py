"""Tables of CERs, with several checkpoints side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from las_fast.checkpoint import Loaded, find_checkpoint, load_model
from las_fast.errors import InputError

Key = tuple[str, str, str]  # checkpoint, row and part


def load_checkpoints(names: Sequence[str]) -> list[Loaded]:
    """Load every checkpoint of --checkpoint.

    Raises:
        InputError: two names are of one file, or see load_model.
    """
    given: dict[Path, str] = {}
    for name in names:
        path = find_checkpoint(name).resolve()
        if path in given:
            raise InputError(f"--checkpoint {given[path]} and {name} are the same file, {path}; give each file once")
        given[path] = name
    return [load_model(name) for name in names]


def labels(names: Sequence[str]) -> list[str]:
    """Return the names of files without suffix and of run folders, or `names` itself if two would be equal."""
    short = [Path(name).absolute().name.removesuffix(".safetensors") for name in names]
    return short if len(set(short)) == len(short) else list(names)


def score_table(title: str, cers: Mapping[Key, float], show: Callable[[Key], str], *, checkpoints: Sequence[str],
                rows: Sequence[str], parts: Sequence[str]) -> str:  # fmt: skip
    """Return a Markdown table with a column per part.

    With one checkpoint, the table has a line per row. With several, it has a line per row and checkpoint, and a line
    with the relative change of the CER from the first checkpoint to the last. What is not in `cers` is an empty cell.

    Args:
        title: of the first column.
        cers:  percent.
        show:  returns the text of the cell of a key of `cers`.
    """
    several = len(checkpoints) > 1
    lines = [[title, "checkpoint", *parts]]
    for row in rows:
        for name in checkpoints:
            keys = [(name, row, part) for part in parts]
            lines.append([row, name, *(show(key) if key in cers else "" for key in keys)])
        if several:
            ends = [[cers.get((name, row, part)) for name in (checkpoints[0], checkpoints[-1])] for part in parts]
            lines.append([row, "change", *(relative_change(*pair) for pair in ends)])
    if not several:
        lines = [[first, *cells] for first, _, *cells in lines]
    header, *body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([header, f"|{'---|' * len(lines[0])}", *body])


def relative_change(first: float | None, last: float | None) -> str:
    """Return the change from `first` to `last` relative to `first`, such as "-12.5%"; "" if it is not defined."""
    return f"{100 * (last / first - 1):+.1f}%" if first and last is not None else ""
