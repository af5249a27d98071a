"""The attention of the model while it spells a given text to a segment of speech, for the page."""

from __future__ import annotations

import base64
from typing import Any

import torch

from las_fast.data.audio import open_recording
from las_fast.data.features import seconds_of
from las_fast.data.segments import segments
from las_fast.errors import InputError
from las_fast.recogniser import Recogniser
from las_fast.text import EOS

MAX_CHARACTERS = 1000  # of the text


@torch.inference_mode()
def attention_of(model: Recogniser, recording: Any, text: str) -> dict[str, Any]:
    """Compute teacher-forced attention; the segment with the most speech is used.

    Returns:
        text, frames T, frame_seconds, start (of the segment, in seconds) and weights: base64 of (U, T) bytes, U the
        characters and <eos>, each row divided by the largest weight of all.

    Raises:
        InputError: the recording or the text is invalid.
    """
    loaded = model.loaded
    if not 0 < len(text) <= MAX_CHARACTERS:
        raise InputError(f"the text must have 1 to {MAX_CHARACTERS} characters; got {len(text)}")
    tokens = [*loaded.vocabulary.encode(text), EOS]
    config = loaded.config.features
    with open_recording(recording, config.sample_rate) as blocks:
        speech = max(segments(blocks, config, loaded.statistics), key=lambda one: one.end - one.start, default=None)
    if speech is None:
        raise InputError("the file has no speech; send a segment with speech")
    features = speech.features[None].to(model.device)
    lengths = torch.tensor([features.shape[1]], device=model.device)
    weights = loaded.model(features, lengths, torch.tensor([tokens], device=model.device)).weights[0]
    shades = (255 * weights / weights.max().clamp_min(1e-6)).round().to(torch.uint8).cpu()
    return {
        "text": text,
        "frames": shades.shape[1],
        "frame_seconds": seconds_of(loaded.model.time_reduction, config),
        "start": speech.start,
        "weights": base64.b64encode(shades.numpy().tobytes()).decode(),
    }
