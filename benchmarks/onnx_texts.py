"""Compare an exported ONNX model with las_fast on a split: the greedy texts, and the logits of their tokens.

    python -m benchmarks.onnx_texts --checkpoint an4 --data AN4

Both get the same features: those of las_fast, trimmed but not normalised. The example las_fast/deploy/onnx_greedy.py
computes the texts of the ONNX model.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.splits import scored_split
from las_fast.arguments import as_path
from las_fast.checkpoint import Loaded, load_model
from las_fast.cli import run
from las_fast.config import DecodingSettings
from las_fast.data.batch import make_loader
from las_fast.data.batch_plan import sorted_batches
from las_fast.data.dataset import SpeechDataset
from las_fast.deploy.onnx_greedy import Recogniser
from las_fast.errors import InputError
from las_fast.export import export_onnx
from las_fast.model.attention import Memory
from las_fast.options import Parser
from las_fast.search.beam import greedy_search
from las_fast.splits import add_utterance_options
from las_fast.text import EOS, SOS


def parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.onnx_texts", description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="run folder, file or released model")
    parser.add_argument("--data", required=True, type=as_path, help="data as in decode")
    parser.add_argument("--split", default="dev", help="(default: dev)")
    add_utterance_options(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Print the comparison; raise InputError if a text differs."""
    options = parser().parse_args(argv)
    torch.set_num_threads(1)
    loaded = load_model(options.checkpoint)
    dataset = scored_split(options, loaded)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "model.onnx")
        export_onnx(loaded, DecodingSettings(replace(loaded.config.decoding, beam=1)), out)
        model = Recogniser(str(out))
    different, distance, seconds = compare(loaded, dataset, model)
    audio = float(dataset.seconds.sum())
    print(f"{len(dataset)} utterances, {audio:.0f} s: {len(different)} texts differ, logits by at most {distance:.1e}")
    print("; ".join(f"{name} {value:.1f} s, {audio / value:.0f} times real time" for name, value in seconds.items()))
    if different:
        raise InputError(f"the texts of {', '.join(different[:5])} differ; report a bug of export --format onnx")


@torch.inference_mode()
def compare(loaded: Loaded, dataset: SpeechDataset, model: Recogniser) -> tuple[list[str], float, dict[str, float]]:
    """Return the ids whose greedy texts differ, the largest difference of logits, and seconds per implementation."""
    decoding = loaded.config.decoding.greedy()
    different, distance, seconds = [], 0.0, {"las_fast": 0.0, "onnxruntime": 0.0}
    batches = sorted_batches(dataset.frame_counts, frames_per_batch=decoding.frames_per_batch, utterances_per_batch=128)
    for batch in make_loader(dataset, batches, loaded.vocabulary, augment=None, seed=0, epoch=0, workers=0):
        indices = batch.indices.tolist()
        start = time.perf_counter()
        memory = loaded.model.listen(batch.features, batch.feature_lengths)
        tokens = [best.text_tokens for (best,) in greedy_search(loaded.model, memory, decoding)]
        middle = time.perf_counter()
        texts = model.greedy([dataset.raw(i).numpy() for i in indices])
        seconds["onnxruntime"] += time.perf_counter() - middle
        seconds["las_fast"] += middle - start
        different += [
            dataset.ids[i]
            for i, ours, text in zip(indices, tokens, texts, strict=True)
            if loaded.vocabulary.decode(ours) != text
        ]
        onnx_memory = model.listen([dataset.raw(i).numpy() for i in indices])
        distance = max(distance, logit_distance(loaded, memory, onnx_memory, tokens, model))
    return different, distance, seconds


def logit_distance(
    loaded: Loaded, memory: Memory, onnx_memory: dict[str, np.ndarray], texts: list[list[int]], model: Recogniser
) -> float:
    """Return the largest difference between the logits of both spellers, with teacher forcing, in a batch.

    Args:
        memory:      from the listener of las_fast.
        onnx_memory: from the listener in ONNX.
        texts:       tokens of each utterance, without <sos> and <eos>.
    """
    inputs = model.speller.get_inputs()[4:]
    state = {one.name: np.zeros((len(texts), 1, one.shape[2]), np.float32) for one in inputs}
    las_state, distance = loaded.model.start(memory, 1), 0.0
    steps = torch.nn.utils.rnn.pad_sequence([torch.tensor([SOS, *text]) for text in texts], padding_value=EOS)
    lengths = torch.tensor([len(text) for text in texts])
    for i, tokens in enumerate(steps):
        expected, _, las_state = loaded.model.step(tokens[:, None], las_state, memory)
        logits, _, *new_state = model.speller.run(None, {"tokens": tokens[:, None].numpy(), **onnx_memory, **state})
        state = dict(zip(state, new_state, strict=True))
        rows = lengths >= i  # utterances that have not ended
        # Without <pad> and <sos>: their logits are about -1e4, where float32 has steps of 1e-3.
        distance = max(distance, float((expected - torch.from_numpy(logits)).abs()[rows, :, EOS:].max()))
    return distance


if __name__ == "__main__":
    run(main)
