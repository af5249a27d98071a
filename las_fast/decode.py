"""python -m las_fast.decode: a split of a data set into a submission file, with scores where transcripts exist."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from las_fast.cli import run
from las_fast.config import DecodingConfig, DecodingSettings, check_decoding
from las_fast.errors import InputError
from las_fast.files import first_line, prepare_output_file
from las_fast.options import Parser, as_file, as_path, parse_settings
from las_fast.search.ngram import default_weight
from las_fast.system import choose_device, give_large_blocks_back

if TYPE_CHECKING:  # these import torch, which --help need not wait for
    from las_fast.checkpoint import Loaded
    from las_fast.data.dataset import Corpus, SpeechDataset
    from las_fast.output.metrics import Scores
    from las_fast.search.beam import Hypothesis

LISTED = 20  # characters named in an error


def parser() -> Parser:
    own = Parser(prog="python -m las_fast.decode", description=__doc__, add_help=False)
    own.add_argument("--checkpoint", required=True, metavar="RUN|FILE|NAME", help="training folder, file or name")
    own.add_argument("--data", required=True, type=as_path, metavar="ROOT", help="archive, corpus folder or manifest")
    own.add_argument("--split", required=True, help="split name, or train, dev or test; join several with +")
    own.add_argument("--out", required=True, type=as_file, metavar="FILE.csv", help="the submission file")
    own.add_argument("--beam", type=int, help="hypotheses followed; 1 is greedy (default: the checkpoint's)")
    own.add_argument("--nbest", type=int, default=1, metavar="N", help="hypotheses kept in --jsonl (default: 1)")
    own.add_argument("--jsonl", type=as_file, metavar="FILE", help="also write scores, frames, n best as JSON")
    own.add_argument("--lm", metavar="FILE", help="language model, of weight 0.1 unless set (default: its own)")
    own.add_argument("--on-bad", choices=("error", "skip"), default="error", help="skip lists unusable utterances")
    own.add_argument("--normalise-text", action="store_true", help="map transcripts onto the checkpoint's characters")
    own.add_argument("--any-features", action="store_true", help="decode frames of another kind than were trained on")
    own.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    return own


def main(argv: list[str] | None = None) -> None:
    """Decode; see --help. The last line printed is JSON."""
    give_large_blocks_back()
    loaded: list[Loaded] = []  # made while parsing: the checkpoint brings the default settings

    def defaults(options: argparse.Namespace) -> DecodingSettings:
        from las_fast.checkpoint import load_model

        check_options(options)
        loaded.append(load_model(options.checkpoint, choose_device(options.device)))
        decoding = default_weight(loaded[0].config.decoding, options.lm)
        return DecodingSettings(decoding if options.beam is None else replace(decoding, beam=options.beam))

    options, settings = parse_settings(parser(), argv, defaults, kind=DecodingSettings)
    check_decoding(loaded[0].config, settings.decoding)
    if options.beam not in (None, settings.decoding.beam):
        beams = f"--beam {options.beam} and --decoding.beam {settings.decoding.beam}"
        raise InputError(f"{beams} disagree; give one of them")
    if options.nbest > settings.decoding.beam:
        raise InputError(f"--nbest {options.nbest} needs a beam at least as wide; give --beam {options.nbest}")
    decode(options, loaded[0], settings.decoding)


def check_options(options: argparse.Namespace) -> None:
    """Raise InputError for what must not be found out only after an hour of decoding."""
    if options.nbest < 1:
        raise InputError(f"--nbest must be at least 1; got {options.nbest}")
    if options.jsonl and options.jsonl.absolute() == options.out.absolute():
        raise InputError(f"--out and --jsonl are both {options.out}; give each a file of its own")
    inputs = (options.data, options.checkpoint, options.lm)
    kind: dict[str, Any] = {"what": "a submission in CSV", "suffixes": (".csv", ".txt"), "may_replace": is_submission}
    prepare_output_file(options.out, "--out", inputs=inputs, **kind)
    if options.jsonl:
        kind = {"what": "JSON Lines", "suffixes": (".jsonl", ".json", ".txt"), "may_replace": is_jsonl}
        prepare_output_file(options.jsonl, "--jsonl", inputs=inputs, **kind)


def is_submission(path: Path) -> bool:
    """Return whether an earlier run may have written a file: two columns, the first of ids or row numbers."""
    columns = first_line(path).split(",")
    return len(columns) == 2 and columns[0].lower() in ("id", "index")


def is_jsonl(path: Path) -> bool:
    """Return whether an earlier run may have written a file, by its first line."""
    return first_line(path).startswith('{"id": ')


def decode(options: argparse.Namespace, loaded: Loaded, decoding: DecodingConfig) -> None:
    """Decode options.split and write and print everything that was asked for."""
    from las_fast.data.dataset import load_dataset, open_corpus
    from las_fast.recogniser import Recogniser

    model = Recogniser(loaded, choose_device(options.device), lm_option="--lm ")
    decoder = model.decoder(decoding, options.lm)
    corpus = open_corpus(options.data)
    print(f"data: {corpus.name}")
    check_fits(corpus, loaded, any_features=options.any_features)
    splits = corpus.resolve(options.split)
    data = loaded.config.data
    dataset = load_dataset(
        corpus,
        splits,
        features=loaded.config.features,
        data=replace(data, on_bad=options.on_bad, normalise_text=options.normalise_text or data.normalise_text),
        statistics=loaded.statistics,
        need_text=False,
    )
    check_references(dataset, loaded, normalised=options.normalise_text or data.normalise_text)
    started = time.perf_counter()
    found = model.decode_dataset(dataset, decoder, nbest=options.nbest)
    seconds = time.perf_counter() - started
    rows = [describe(dataset, i, found[i], loaded) for i in range(len(dataset))]
    write_results(options, corpus, splits, dataset, rows)
    result = summarise(dataset, rows, seconds)
    print(table(result, options.out))
    print(json.dumps(result))


def check_fits(corpus: Corpus, loaded: Loaded, *, any_features: bool = False) -> None:
    """Raise InputError where the frames are not what the checkpoint was trained on.

    Another size never fits. Another kind, frames computed here or an archive's own, does with any_features; another
    archive with frames of the same size is worth a warning.
    """
    size = loaded.config.features.size
    if corpus.kind == "features" and corpus.feature_size != size:
        raise InputError(
            f"{corpus.name} has {corpus.feature_size} values a frame, checkpoint {loaded.path} was trained on {size}; "
            "decode the edition that it was trained on, or train on this one"
        )
    known = loaded.info.get("data")  # {"kind", "name"} of the corpus
    if known is None:
        return
    if known["kind"] != corpus.kind:
        kinds = {"features": "an archive's own frames", "audio": "frames computed from audio"}
        trained = f"checkpoint {loaded.path} was trained on {kinds[known['kind']]} ({known['name']})"
        problem = f"{trained}, {corpus.name} has {kinds[corpus.kind]}"
        if not any_features:
            raise InputError(f"{problem}; decode data of the same kind, or add --any-features to decode all the same")
        print(f"warning: {problem}; expect many errors", file=sys.stderr)
    elif corpus.kind == "features" and known["name"] != corpus.name:
        print(
            f"warning: checkpoint {loaded.path} was trained on {known['name']}, this is {corpus.name}; "
            "its frames have the same size but may be made otherwise",
            file=sys.stderr,
        )


def reference(dataset: SpeechDataset, i: int) -> str | None:
    """Return an utterance's transcript; None where there is none or it is blank."""
    text = dataset.texts[i]
    return text if text and text.strip() else None


def check_references(dataset: SpeechDataset, loaded: Loaded, *, normalised: bool) -> None:
    """Raise InputError where a transcript holds what the model cannot write: each such character would be an error."""
    unknown = {i: loaded.vocabulary.unknown(reference(dataset, i) or "") for i in range(len(dataset))}
    wrong = [i for i, characters in unknown.items() if characters]
    if not wrong:
        return
    characters = sorted({character for i in wrong for character in unknown[i]})
    more = f" and {len(characters) - LISTED} more" if len(characters) > LISTED else ""
    raise InputError(
        f"{len(wrong)} of {len(dataset)} transcripts, the first that of {dataset.ids[wrong[0]]}, have characters "
        f"outside the checkpoint's vocabulary: {' '.join(map(repr, characters[:LISTED]))}{more}; "
        + ("write digits as words in the transcripts" if normalised else "add --normalise-text to map them")
    )


def describe(dataset: SpeechDataset, i: int, hypotheses: list[Hypothesis], loaded: Loaded) -> dict:
    """Return an utterance's row for the JSON lines."""
    best = hypotheses[0]
    nbest = [{"text": loaded.vocabulary.decode(h.text_tokens), "score": round(h.score, 4)} for h in hypotheses]
    each = loaded.model.time_reduction  # feature frames in one encoder frame
    frames = [dataset.recording_frame(i, frame * each + each // 2) // each for frame in best.frames]
    row = {"id": dataset.ids[i], **nbest[0], "frames": frames, "nbest": nbest}
    text = reference(dataset, i)
    return row if text is None else {**row, "reference": text}


def write_results(
    options: argparse.Namespace, corpus: Corpus, splits: tuple[str, ...], dataset: SpeechDataset, rows: list[dict]
) -> None:
    """Write the submission, with an empty text where an utterance was left out, and the JSON lines."""
    from las_fast.files import write_text_atomically
    from las_fast.output.submission import write_submission

    ids = [(split, utterance.id) for split in splits for utterance in corpus.utterances(split)]
    texts = [""] * len(ids)
    shared = False  # ids by several splits: the data set then puts the split before each
    for position, row in zip(dataset.positions.tolist(), rows, strict=True):
        texts[position] = row["text"]
        shared = shared or row["id"] != ids[position][1]
    names = [f"{split}/{name}" if shared else name for split, name in ids]
    write_submission(options.out, names, texts, header=corpus.header, numbered=corpus.numbered)
    if options.jsonl:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text_atomically(options.jsonl, lines)


def summarise(dataset: SpeechDataset, rows: list[dict], seconds: float) -> dict:
    """Return the JSON of the last line: scores are there only where transcripts are."""
    from las_fast.output.metrics import score

    audio_seconds = math.fsum(dataset.seconds)
    told = [row for row in rows if "reference" in row]
    result: dict[str, float] = {"utterances": len(rows)}
    if dataset.skipped:
        result["skipped"] = len(dataset.skipped)
    if 0 < len(told) < len(rows):
        result["scored"] = len(told)
    if told:
        scores: Scores = score([row["reference"] for row in told], [row["text"] for row in told])
        result |= {name: round(value, 4) for name, value in asdict(scores).items() if name != "utterances"}
    times = {"seconds": seconds, "audio_seconds": audio_seconds, "rtfx": audio_seconds / max(seconds, 1e-9)}
    return result | {name: round(value, 3) for name, value in times.items()}


def table(result: dict, out: Path) -> str:
    """Return the result for people to read."""
    lines = [("utterances", f"{result['utterances']}")]
    if "skipped" in result:
        lines.append(("left out", f"{result['skipped']} that could not be used; their rows in {out.name} are empty"))
    if "scored" in result:
        untold = result["utterances"] - result["scored"]
        lines.append(("scored", f"{result['scored']}; the other {untold} have no transcript"))
    if "ld" in result:
        lines += [
            ("LD", f"{result['ld']:.2f} characters an utterance"),
            ("CER", f"{result['cer']:.2f} %"),
            ("WER", f"{result['wer']:.2f} %"),
        ]
    speed = f"{result['audio_seconds']:.0f} s of audio in {result['seconds']:.1f} s, {result['rtfx']:.0f} x real time"
    lines += [("speed", speed), ("written", f"{out}")]
    return "\n".join(f"{name:<12}{value}" for name, value in lines)


if __name__ == "__main__":
    run(main)
