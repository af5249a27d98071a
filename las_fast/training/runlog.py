"""Logs of a training: log.jsonl, TensorBoard and, if enabled, Weights & Biases."""

from __future__ import annotations

import contextlib
import json
import math
import resource
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from las_fast.config import Config, to_yaml
from las_fast.errors import InputError, show
from las_fast.files import utf8_path, write_text_atomically
from las_fast.training.origin import run_id
from las_fast.tree import to_tree

if TYPE_CHECKING:
    from las_fast.training.validate import Sample, Validation

RENAMED = {"heard": "audio_gain"}  # keys of `monitor` in logs of earlier versions


class RunLog:
    """Writes rows to log.jsonl, TensorBoard and, if enabled, Weights & Biases.

    On resume, rows after `step` or after `epoch` are dropped; TensorBoard knows only `step`.
    """

    def __init__(self, out: Path, config: Config, step: int, epoch: float = math.inf):
        from torch.utils.tensorboard import SummaryWriter

        self.path = out / "log.jsonl"
        kept = [row for row in read_rows(self.path) if row["step"] <= step and row.get("epoch", 0) <= epoch]
        write_text_atomically(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.file = self.path.open("a", buffering=1)
        self._resources = contextlib.ExitStack()
        folder = self._resources.enter_context(utf8_path(out))
        self.board = SummaryWriter(f"{folder}/tensorboard", purge_step=step + 1)
        self.board.add_text("settings", as_code(to_yaml(config)), step)
        self.wandb = start_wandb(out, config) if config.training.wandb else None

    def training(self, step: int, epoch: float, values: dict, lr: float) -> None:
        self._write({"kind": "train", "step": step, "epoch": epoch, "lr": lr, **values})

    def validation(self, step: int, epoch: float, result: Validation, line: str, core_hours: float) -> None:
        row = {"loss": result.loss, **asdict(result.scores), "monitor": asdict(result.alignment), "line": line}
        row["core_hours"] = round(core_hours, 4)
        row["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)
        self._write({"kind": "valid", "step": step, "epoch": epoch, **row})
        for sample in result.samples:
            self._show_sample(sample, step)

    def _show_sample(self, sample: Sample, step: int) -> None:
        """Add the text and the attention of a dev utterance to TensorBoard."""
        from matplotlib.image import imread

        name = show(sample.id)
        texts = f"reference\n{sample.reference}\n\nhypothesis\n{sample.hypothesis}"
        self.board.add_text(f"dev/{name}", as_code(texts), step)
        self.board.add_image(f"attention/{name}", imread(sample.picture)[..., :3], step, dataformats="HWC")

    def _write(self, row: dict) -> None:
        try:
            self.file.write(json.dumps(replace_non_finite(row)) + "\n")
        except OSError as error:
            problem = f"{self.path} cannot be written ({error.strerror})"
            raise InputError(f"{problem}; check the disk's space and permissions") from None
        scalars = {f"{row['kind']}/{k}": v for k, v in row.items() if isinstance(v, float) and k != "epoch"}
        scalars |= {f"monitor/{k}": float(v) for k, v in row.get("monitor", {}).items() if v is not None}
        for name, value in scalars.items():
            self.board.add_scalar(name, value, row["step"])
        if self.wandb is not None:
            self.wandb.log(scalars, step=row["step"])

    def close(self) -> None:
        self.file.close()
        self.board.close()
        self._resources.close()
        if self.wandb is not None:
            self.wandb.finish()


def read_rows(path: Path) -> list[dict]:
    """Return the rows of a log.jsonl that have a kind and a step; [] if the file does not exist.

    Other lines are skipped: incomplete after a full disk or a power cut, or of other programs. Keys of earlier versions
    get their current names.
    """
    rows = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # ValueError also covers bytes that are not UTF-8
            continue
        if isinstance(row, dict) and isinstance(row.get("kind"), str) and type(row.get("step")) is int:
            rows.append(_with_current_names(row))
    return rows


def _with_current_names(row: dict) -> dict:
    monitor = row.get("monitor")
    if not isinstance(monitor, dict):
        return row
    return {**row, "monitor": {RENAMED.get(name, name): value for name, value in monitor.items()}}


def replace_non_finite(value):
    """Replace NaN and infinity, which JSON lacks, by None, also inside dicts."""
    if isinstance(value, dict):
        return {key: replace_non_finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_code(text: str) -> str:
    """Return text as a Markdown code block, in which lines are kept."""
    return "".join(f"    {line}\n" for line in text.splitlines())


def start_wandb(out: Path, config: Config):
    """Start a Weights & Biases run, or continue it on resume: online if there is an API key, else in the run folder.

    Raises:
        InputError: the package wandb is missing.
    """
    try:
        import wandb
    except ImportError:
        raise InputError("--training.wandb needs the package wandb; run: pip install wandb") from None
    mode = "online" if wandb.api.api_key else "offline"
    return wandb.init(
        project="las_fast", id=run_id(out), dir=str(out), mode=mode, config=to_tree(config), resume="allow"
    )
