"""The same beam search, with the same weights, by every implementation available here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.plain import Plain, Usual
from las_fast.config import DecodingConfig, ListenerConfig, ModelConfig, SpellerConfig
from las_fast.model.las import LAS
from las_fast.ops import backends
from las_fast.search.beam import beam_search, packed_weights
from las_fast.search.native import LOW_PRECISIONS

STEPS = 64
SCORE_RTOL = 1e-4  # float32
SCORE_RTOL_LOW = 1e-2  # bfloat16 and int8


@dataclasses.dataclass(frozen=True)
class Shape:
    B: int = 16
    K: int = 8
    T: int = 200
    V: int = 31
    H: int = 512  # size of both LSTM cells, the embedding and the values
    steps: int = STEPS

    def __str__(self) -> str:
        return f"B{self.B} K{self.K} T{self.T} V{self.V} H{self.H} D256 {self.steps} steps"


class SearchPaths:
    """Functions that run the same search by different paths; each returns the best tokens and their scores (B,)."""

    def __init__(self, shape: Shape, device: str = "cpu"):
        self.shape, self.device = shape, torch.device(device)
        torch.manual_seed(0)
        listener = ListenerConfig((8,), (3,), (1,), 256, 0)
        speller = SpellerConfig(256, shape.H, shape.H, (shape.H, shape.H), 0.0)
        self.model = LAS(ModelConfig(listener, speller), input_size=8, vocabulary_size=shape.V).eval().to(device)
        self.listened = torch.randn(shape.B, shape.T, 512).to(device)
        self.lengths = torch.full((shape.B,), shape.T, device=device)
        self.baselines = {"usual": Usual(self.model).eval().to(device), "plain": Plain(self.model).eval().to(device)}
        self.plain_bf16 = Plain(self.model).eval().to(device).bfloat16(), self.listened.bfloat16()
        # Packed once for all searches, as decode_dataset does; the baselines' weights are converted once too.
        precisions = ("fp32", *LOW_PRECISIONS)
        self.packed = {p: packed_weights(self.model, DecodingConfig(precision=p), device) for p in precisions}

    def paths(self, *names: str) -> dict[str, Callable[[], tuple]]:
        """Return the named paths that can run here; all of them if no name is given."""
        paths = {
            name: lambda model=model: self.run_baseline(model, self.listened) for name, model in self.baselines.items()
        }
        paths["plain bf16"] = lambda: self.run_baseline(*self.plain_bf16)
        paths["las_fast reference"] = lambda: self.run_las_fast("reference")
        if self.device.type == "cuda":
            paths["las_fast steps"] = lambda: self.run_las_fast("auto", capture=False)
            paths["las_fast graph"] = lambda: self.run_las_fast("auto", capture=True)
            paths["las_fast graph bf16"] = lambda: self.run_las_fast("auto", "bf16", capture=True)
        elif backends.unavailable("beam_topk", "cpp") is None:
            paths["las_fast steps"] = lambda: self.run_las_fast("cpp", capture=False)
            paths["las_fast cpp"] = lambda: self.run_las_fast("cpp")
            paths["las_fast bf16"] = lambda: self.run_las_fast("cpp", "bf16")
            paths["las_fast int8"] = lambda: self.run_las_fast("cpp", "int8")
        return {name: run for name, run in paths.items() if not names or name in names}

    def run_baseline(self, model: Plain | Usual, listened: Tensor) -> tuple[list, Tensor]:
        tokens, scores = model.search(listened, self.lengths, self.shape.K, self.shape.steps)
        return tokens[:, 0, :-1].tolist(), scores[:, 0]

    @torch.inference_mode()
    def run_las_fast(self, backend: str, precision: str = "fp32", capture: bool | None = None) -> tuple[list, Tensor]:
        """capture=False runs the search step by step, one op at a time, even where one op could do all of it."""
        limits = {"minimum_share": 1.0, "maximum_share": 0.0, "maximum_extra": self.shape.steps - 1}
        # Without a threshold: the baselines keep all hypotheses.
        config = DecodingConfig(beam=self.shape.K, beam_threshold=0.0, precision=precision, **limits)
        # As in decode_dataset.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=precision in LOW_PRECISIONS):
            memory = self.model.speller.attention.project_memory(self.listened, self.lengths)
        packed = self.packed[precision]
        hypotheses = beam_search(self.model, memory, config, packed=packed, backend=backend, capture=capture)
        scores = torch.tensor([h[0].score for h in hypotheses], device=self.device)
        return [h[0].text_tokens for h in hypotheses], scores

    def check(self, paths: dict[str, Callable[[], tuple]]) -> None:
        """Assert that scores agree with plain's, and in float32 the hypotheses too.

        At other shapes than the default a tenth of the utterances may differ: over hundreds of steps, some beams tie
        up to rounding.
        """
        expected_tokens, expected_scores = self.paths("plain")["plain"]()
        max_different = 0 if self.shape == Shape() else max(1, self.shape.B // 10)
        for name, run in paths.items():
            tokens, scores = run()
            low = dtype_of(name) != "float32"
            rtol = SCORE_RTOL_LOW if low else SCORE_RTOL
            torch.testing.assert_close(scores.float(), expected_scores, rtol=rtol, atol=0.0, msg=f"scores of {name}")
            different = sum(x != y for x, y in zip(tokens, expected_tokens, strict=True))
            assert low or different <= max_different, f"hypotheses of {name}"


def dtype_of(path: str) -> str:
    return {"bf16": "bfloat16", "int8": "int8"}.get(path.split()[-1], "float32")


def compare_searches(
    compare,
    shape: Shape,
    *names: str,
    others: dict[str, Callable] | None = None,
    file: str = "decode",
    what: str = "beam search",
    rounds: int = 5,
) -> None:
    """Check and time the named paths, and time `others`: searches of the same size with weights of their own."""
    search_paths = SearchPaths(shape)
    paths = search_paths.paths(*names)
    search_paths.check(paths)
    paths |= others or {}
    compare(
        file,
        paths,
        what=what,
        shape=str(shape),
        dtypes={name: dtype_of(name) for name in paths},
        baseline="plain",
        rounds=rounds,
        per=shape.B * shape.steps * 1e-6,
        unit="us/utterance/step",
    )
