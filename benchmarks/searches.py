"""One beam search of one set of weights on every path that there is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.plain import Plain, Usual
from las_fast.config import DecodingConfig, ListenerConfig, ModelConfig, SpellerConfig
from las_fast.model.las import LAS
from las_fast.ops import backends
from las_fast.search.beam import REDUCED, beam_search, packed_weights

STEPS = 64
CLOSE = 1e-4  # relative, of scores in float32
CLOSE_BF16 = 1e-2


@dataclasses.dataclass(frozen=True)
class Shape:
    B: int = 16
    K: int = 8
    T: int = 200
    V: int = 31
    H: int = 512  # of both LSTM cells, of the embedding and of the values
    steps: int = STEPS

    def __str__(self) -> str:
        return f"B{self.B} K{self.K} T{self.T} V{self.V} H{self.H} D256 {self.steps} steps"


class Searches:
    """The same search of the same weights on every path that there is; each returns tokens and the best scores."""

    def __init__(self, shape: Shape):
        self.shape = shape
        torch.manual_seed(0)
        listener = ListenerConfig((8,), (3,), (1,), 256, 0)
        speller = SpellerConfig(256, shape.H, shape.H, (shape.H, shape.H), 0.0)
        self.model = LAS(ModelConfig(listener, speller), input_size=8, vocabulary_size=shape.V).eval()
        self.listened = torch.randn(shape.B, shape.T, 512)
        self.lengths = torch.full((shape.B,), shape.T)
        self.halves = Plain(self.model).eval().bfloat16(), self.listened.bfloat16()
        # As the baselines' weights, converted once for all searches: so las_fast.search.dataset.decode_dataset does it.
        self.packed = {p: packed_weights(self.model, DecodingConfig(precision=p), "cpu") for p in ("fp32", *REDUCED)}
        self.whole = {"usual": Usual(self.model).eval(), "plain": Plain(self.model).eval()}

    def paths(self, *names: str) -> dict[str, Callable[[], tuple]]:
        """Return the paths of those names that can run here, all of them where none is named."""
        found = {name: lambda name=name: self.baseline(self.whole[name], self.listened) for name in self.whole}
        found["plain bf16"] = lambda: self.baseline(*self.halves)
        found["las_fast reference"] = lambda: self.own("reference")
        if backends.unavailable("beam_topk", "cpp") is None:
            found["las_fast steps"] = lambda: self.own("cpp", capture=False)
            found["las_fast cpp"] = lambda: self.own("cpp")
            found["las_fast bf16"] = lambda: self.own("cpp", "bf16")
            found["las_fast int8"] = lambda: self.own("cpp", "int8")
        return {name: run for name, run in found.items() if not names or name in names}

    def baseline(self, model, listened) -> tuple[list, Tensor]:
        tokens, scores = model.search(listened, self.lengths, self.shape.K, self.shape.steps)
        return tokens[:, 0, :-1].tolist(), scores[:, 0]

    @torch.inference_mode()
    def own(self, backend: str, precision: str = "fp32", capture: bool | None = None) -> tuple[list, Tensor]:
        """capture False: one step after another, each op by itself, where the search could be one op."""
        steps = self.shape.steps
        config = DecodingConfig(
            beam=self.shape.K, minimum_share=1.0, maximum_share=0.0, maximum_extra=steps - 1, precision=precision
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=precision in REDUCED):  # as las_fast.search.dataset.listen
            memory = self.model.speller.attention.remember(self.listened, self.lengths)
        packed = self.packed[precision]
        found = beam_search(self.model, memory, config, packed=packed, backend=backend, capture=capture)
        return [h[0].text_tokens for h in found], torch.tensor([h[0].score for h in found])

    def check(self, paths: dict[str, Callable[[], tuple]]) -> None:
        """In float32 the hypotheses are the same, in less precision as good by their own scores.

        At other shapes than the default a few utterances may differ: of hundreds of prunings some leave two beams that
        are equal but for rounding.
        """
        tokens, scores = self.paths("plain")["plain"]()
        few = 0 if self.shape == Shape() else max(1, self.shape.B // 10)
        for name, run in paths.items():
            found, own = run()
            half = dtype_of(name) != "float32"
            close = CLOSE_BF16 if half else CLOSE
            torch.testing.assert_close(own.float(), scores, rtol=close, atol=0.0, msg=f"scores of {name}")
            assert half or sum(x != y for x, y in zip(found, tokens, strict=True)) <= few, f"hypotheses of {name}"


def dtype_of(path: str) -> str:
    return {"bf16": "bfloat16", "int8": "int8"}.get(path.split()[-1], "float32")


def timed(
    compare,
    shape: Shape,
    *names: str,
    others: dict[str, Callable] | None = None,
    file: str = "decode",
    what: str = "beam search",
    rounds: int = 5,
) -> None:
    """Check and time the paths of those names, and other searches of the same size whose results nobody knows."""
    searches = Searches(shape)
    paths = searches.paths(*names)
    searches.check(paths)
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
