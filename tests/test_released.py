"""The released models: small, with complete cards, as accurate as the cards say, and equal in any batch."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from las_fast.checkpoint import RELEASED, find_checkpoint, load_model, released_models
from las_fast.data.batch import make_loader
from las_fast.ops import backends
from las_fast.output.metrics import score
from las_fast.search.beam import beam_search
from las_fast.search.dataset import listen
from las_fast.search.grid import decode_grid
from las_fast.search.ngram import lm_path_for, load_ngram_model
from las_fast.splits import open_split

CPU_BACKENDS = [
    name for name in ("reference", "cpp") if not any(backends.unavailable(op, name) for op in backends.IMPLEMENTED)
]
ROOT = Path(__file__).parents[1]
MODELS = {"an4": "an4", "english": "speech"}  # and the shared recordings with its dev split


def test_this_test_covers_every_released_model():
    assert released_models() == sorted(MODELS)


def test_every_file_belongs_to_a_released_model():
    files = {path.name for path in RELEASED.iterdir()} - {"README.md", "default.words.json"}
    assert {name.partition(".")[0] for name in files} == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_a_released_model_is_small_with_a_complete_card(name):
    assert find_checkpoint(name).stat().st_size <= 25e6
    card = (RELEASED / f"{name}.md").read_text(encoding="utf-8")
    for heading in ("What it does", "Data", "Scores", "Limits", "Licence", "How it was made"):
        assert f"\n## {heading}\n" in card
    loaded = load_model(name)
    assert all(parameter.isfinite().all() for parameter in loaded.model.parameters())
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters()) / 1e6
    assert f"{parameters:.1f} million parameters" in card
    assert f"`--decoding.ctc-weight {loaded.config.decoding.ctc_weight:g}`" in card


@pytest.mark.parametrize("page", [ROOT / "README.md", RELEASED / "README.md"], ids=["README", "checkpoints"])
@pytest.mark.parametrize("name", MODELS)
def test_a_readme_has_the_size_and_score_of_a_released_model(name, page):
    card = (RELEASED / f"{name}.md").read_text(encoding="utf-8")
    best = float(re.findall(rf"^\| (?:greedy|beam)[^|]*\| (?:{name} \| )?([\d.]+) / ", card, re.MULTILINE)[-1])
    (row,) = re.findall(rf"^\| \[`{name}`\].*$", page.read_text(encoding="utf-8"), re.MULTILINE)
    *_, sizes, scores = row.strip("| ").split(" | ")
    files = [find_checkpoint(name), *filter(Path.exists, [lm_path_for(find_checkpoint(name))])]
    written = re.findall(r"([\d.]+) MB", sizes)
    assert written == [f"{file.stat().st_size / 1e6:.{len(one.partition('.')[2])}f}" for file, one in
                       zip(files, written, strict=True)]  # fmt: skip
    assert float(re.findall(r"([\d.]+)%", scores)[-1]) == pytest.approx(best, abs=0.051)


def dev_of(name, shared):
    loaded = load_model(name)
    return loaded, open_split(shared / MODELS[name], "dev", loaded, on_bad=None, normalise_text=False)


@pytest.mark.parametrize("name", MODELS)
def test_a_released_model_has_the_scores_of_its_card(name, shared):
    loaded, data = dev_of(name, shared)
    settings = loaded.config.decoding
    ngram = load_ngram_model(None, settings, loaded, "cpu")
    greedy = replace(settings, beam=1, ctc_weight=0.0, ngram_weight=0.0, length_reward=0.0)
    actual = [score(data.texts, texts).cer for texts in decode_grid(loaded, data, [greedy, settings], ngram, "cpu")]
    card = (RELEASED / f"{name}.md").read_text(encoding="utf-8")
    rows = re.findall(rf"^\| (?:greedy|beam)[^|]*\| (?:{name} \| )?([\d.]+) / ", card, re.MULTILINE)
    # another processor rounds differently, which may swap two hypotheses of nearly equal score
    assert actual == pytest.approx([float(rows[0]), float(rows[-1])], abs=0.3)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_a_released_model_decodes_an_utterance_alone_as_in_a_batch_of_64(name, backend, shared):
    loaded, data = dev_of(name, shared)
    settings = replace(loaded.config.decoding, beam=4)
    if backend == "reference":  # slow with a language model
        settings = replace(settings, ngram_weight=0.0, length_reward=0.0)
    options = {"ngram": load_ngram_model(None, settings, loaded, "cpu"), "backend": backend}
    batches = [list(range(64)), *([i] for i in range(0, 64, 3))]
    loader = make_loader(data, batches, loaded.vocabulary, augment=None, seed=0, epoch=0, workers=0)
    with torch.inference_mode():
        texts = [
            [best[0].text_tokens for best in beam_search(loaded.model, memory, settings, **options)]
            for memory in (listen(loaded.model, batch, settings) for batch in loader)
        ]
    assert [alone for (alone,) in texts[1:]] == texts[0][::3]
