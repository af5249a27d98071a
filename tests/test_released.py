"""The models that come with the package: small, described, as good as their cards say, and the same in any batch."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from las_fast.checkpoint import RELEASED, find_checkpoint, load_model, released_models
from las_fast.data.batching import make_loader
from las_fast.ops import backends
from las_fast.output.metrics import score
from las_fast.search.beam import beam_search
from las_fast.search.dataset import listen
from las_fast.search.ngram import load_ngram_table
from las_fast.tune import decode_grid, open_split

HERE = [name for name in ("reference", "cpp") if not any(backends.unavailable(op, name) for op in backends.IMPLEMENTED)]
MODELS = {"an4": "an4", "speech13h": "speech"}  # and the folder of shared recordings that holds its dev split


def test_every_released_model_is_known_here():
    assert released_models() == sorted(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_a_released_model_is_small_and_its_card_complete(name):
    assert find_checkpoint(name).stat().st_size <= 25e6
    card = (RELEASED / f"{name}.md").read_text(encoding="utf-8")
    for heading in ("What it does", "Data", "Scores", "Limits", "Licence", "How it was made"):
        assert f"\n## {heading}\n" in card
    loaded = load_model(name)
    assert all(parameter.isfinite().all() for parameter in loaded.model.parameters())
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters()) / 1e6
    assert f"{parameters:.1f} million parameters" in card
    assert f"`--decoding.ctc-weight {loaded.config.decoding.ctc_weight:g}`" in card


def dev_of(name, shared):
    loaded = load_model(name)
    return loaded, open_split(SimpleNamespace(data=shared / MODELS[name], split="dev"), loaded)


@pytest.mark.parametrize("name", MODELS)
def test_a_released_model_has_the_scores_of_its_card(name, shared):
    loaded, data = dev_of(name, shared)
    own = loaded.config.decoding
    table = load_ngram_table(None, own, loaded, "cpu")
    greedy = replace(own, beam=1, ctc_weight=0.0, ngram_weight=0.0, length_reward=0.0)
    found = [score(data.texts, texts).cer for texts in decode_grid(loaded, data, [greedy, own], table, "cpu")]
    card = (RELEASED / f"{name}.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:greedy|beam)[^|]*\| ([\d.]+) / ", card, re.MULTILINE)
    # Another processor rounds otherwise, and where two readings are nearly as good another wins.
    assert found == pytest.approx([float(rows[0]), float(rows[-1])], abs=0.3)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("name", MODELS)
def test_a_released_model_decodes_an_utterance_alone_as_in_a_batch_of_64(name, backend, shared):
    loaded, data = dev_of(name, shared)
    own = replace(loaded.config.decoding, beam=4, ngram_weight=0.0, length_reward=0.0)
    batches = [list(range(64)), *([i] for i in range(0, 64, 3))]
    loader = make_loader(data, batches, loaded.vocabulary, augment=None, seed=0, epoch=0, workers=0)
    with torch.inference_mode():
        texts = [
            [best[0].text_tokens for best in beam_search(loaded.model, listen(loaded.model, batch, own), own,
                                                         backend=backend)]
            for batch in loader
        ]  # fmt: skip
    assert [alone for (alone,) in texts[1:]] == texts[0][::3]
