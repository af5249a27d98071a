"""Views: an utterance at other speeds and with a warped frequency axis.

People speak at different speeds, and their vocal tracts differ in length. Therefore an utterance can be decoded several
times: at each speed of decoding.speeds, with the warp at the same position in decoding.warps. The view whose best
hypothesis has the highest score is kept. With warps alone, this is vocal tract length normalisation (Lee and Rose 1996,
"Speaker normalization using efficient frequency warping procedures"). Scores are sums of log-probabilities: the length
penalty and the coverage rank hypotheses within a view, but do not choose between views.

With decoding.view_threshold, an utterance whose text is likely enough is not decoded in the views that are left.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from las_fast.config import DecodingConfig
from las_fast.data.augment import change_speed, frame_counts_at_speed
from las_fast.data.warp import warp_frequencies

if TYPE_CHECKING:
    from las_fast.search.beam import TokenHypothesis


class View(NamedTuple):
    """How an utterance is changed before it is decoded."""

    speed: float  # 2: twice as fast
    warp: float  # factor on its frequencies, see las_fast/data/warp.py


PLAIN = View(1.0, 1.0)


def views_of(config: DecodingConfig) -> list[View]:
    """Return the views in which an utterance is decoded, in order, without repetitions.

    A single speed or warp applies to all. Raises ValueError if there are several of both, in different numbers.
    """
    speeds, warps = config.speeds, config.warps
    count = max(len(speeds), len(warps))
    speeds, warps = (values * count if len(values) == 1 else values for values in (speeds, warps))
    return list(dict.fromkeys(itertools.starmap(View, zip(speeds, warps, strict=True))))


def viewed(dataset, view: View):
    """Return a dataset whose utterances are those of `dataset` in a view; see decode_dataset."""
    return dataset if view == PLAIN else _Viewed(dataset, view)


class _Viewed:
    """A dataset in a view."""

    def __init__(self, dataset: Any, view: View):
        self.dataset, self.view = dataset, view
        self.ids, self.seconds = dataset.ids, dataset.seconds
        self.frame_counts = frame_counts_at_speed(dataset.frame_counts, view.speed)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> Tensor:
        raw = self.dataset.raw(i)
        if self.view.warp != 1:
            raw = warp_frequencies(raw, self.view.warp, self.dataset.features)
        return self.dataset.prepare(change_speed(raw, self.view.speed))


def is_sure(best: TokenHypothesis, config: DecodingConfig) -> bool:
    """Return whether the score of a finished hypothesis is at least -view_threshold nats per token, <eos> counted.

    A hypothesis of maximum length is never sure: a repeated character costs little.
    """
    tokens = len(best.text_tokens) + 1
    return config.view_threshold > 0 and best.finished and best.score >= -config.view_threshold * tokens


def keep_better(
    kept: list[TokenHypothesis], hypotheses: list[TokenHypothesis], *, frames: int, view_frames: int, reduction: int
) -> list[TokenHypothesis]:
    """Return the hypotheses of one utterance whose best has the higher score; of equal ones, `kept`.

    Args:
        kept:        of earlier views, best first; may be empty.
        hypotheses:  of another view, best first. Their frames and times become those of the utterance.
        frames:      feature frames of the utterance.
        view_frames: feature frames of that view.
        reduction:   feature frames per encoder frame.
    """
    if kept and kept[0].score >= hypotheses[0].score:
        return kept
    if frames == view_frames:
        return hypotheses
    return [_at_own_speed(h, frames / view_frames, last=-(-frames // reduction) - 1) for h in hypotheses]


def _at_own_speed(hypothesis: TokenHypothesis, factor: float, *, last: int) -> TokenHypothesis:
    """Multiply times by a factor; an encoder frame becomes the one, at most `last`, in which its centre lies then."""
    frames = [min(last, int((frame + 0.5) * factor)) for frame in hypothesis.attended_frames]
    words = tuple(dataclasses.replace(w, start=w.start * factor, end=w.end * factor) for w in hypothesis.words)
    return dataclasses.replace(hypothesis, attended_frames=frames, words=words)
