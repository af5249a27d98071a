"""Attention weights of the model while it spells a given text for a segment of speech, for the page."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from las_fast.data.audio import open_recording
from las_fast.data.features import seconds_of
from las_fast.data.normalisation import model_input
from las_fast.data.segments import segments
from las_fast.errors import InputError
from las_fast.recogniser import Recogniser
from las_fast.text import EOS, Vocabulary

MAX_CHARACTERS = 1000  # of the text
MAX_SECONDS = 30.0  # of the recording; segments are shorter


def encode_text(text: str, vocabulary: Vocabulary) -> list[int]:
    """Return the tokens of a text and <eos>; raise InputError if it has no, too many or unknown characters."""
    if not 0 < len(text) <= MAX_CHARACTERS:
        raise InputError(f"the text must have 1 to {MAX_CHARACTERS} characters; got {len(text)}")
    if unknown := vocabulary.unknown(text):
        raise InputError(
            f"the text has {', '.join(map(repr, unknown[:10]))}; the model writes {vocabulary.characters!r} only"
        )
    return [*vocabulary.encode(text), EOS]


@torch.inference_mode()
def attention_of(model: Recogniser, recording: Any, tokens: list[int], *, vad: str = "energy") -> dict[str, Any]:
    """Return the attention weights for U tokens, with teacher forcing, in the longest segment of a recording.

    Args:
        recording: what las_fast.data.audio.open_recording takes, of at most MAX_SECONDS.
        tokens:    (U,) of encode_text.
        vad:       how speech is found; see las_fast.data.segments.segments.

    Returns:
        A JSON object: `frames`, the number T of encoder frames; `frame_seconds`, the time from one to the next;
        `start`, seconds at which the first starts; `weights`, base64 of (U, T) bytes, from 0 to 255 for the largest
        weight of all.

    Raises:
        InputError: the recording cannot be read, is too long or has no speech.
    """
    loaded = model.loaded
    config = loaded.config.features
    with open_recording(recording, config.sample_rate) as blocks:
        short = _limited(blocks, config.sample_rate)
        found = segments(short, config, vad=vad)
        speech = max(found, key=lambda one: one.end - one.start, default=None)
    if speech is None:
        raise InputError("the file has no speech; send a segment with speech")
    features = model_input(speech.frames, config, loaded.statistics)[None].to(model.device)
    lengths = torch.tensor([features.shape[1]], device=model.device)
    weights = loaded.model(features, lengths, torch.tensor([tokens], device=model.device)).weights[0]
    shades = (255 * weights / weights.max().clamp_min(1e-6)).round().to(torch.uint8).cpu()  # (U, T)
    return {
        "frames": shades.shape[1],
        "frame_seconds": seconds_of(loaded.model.time_reduction, config),
        "start": speech.offset,
        "weights": base64.b64encode(shades.numpy().tobytes()).decode(),
    }


def _limited(blocks: Iterable[np.ndarray], sample_rate: int) -> Iterator[np.ndarray]:
    """Yield blocks (n,) of samples; raise InputError if they last longer than MAX_SECONDS."""
    count = 0
    for block in blocks:
        count += len(block)
        if count > MAX_SECONDS * sample_rate:
            raise InputError(f"the file is longer than {MAX_SECONDS:g} seconds; send a single segment")
        yield block
