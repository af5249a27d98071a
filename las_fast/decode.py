"""python -m las_fast.decode: decode a split of a corpus into a submission file, and score it if it has transcripts."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from las_fast.arguments import (
    SEARCH_OPTIONS,
    add_device_option,
    add_lm_option,
    add_search_options,
    as_file,
    as_path,
    check_nbest,
    check_search_options,
)
from las_fast.cli import run
from las_fast.config import DecodingConfig, DecodingSettings, check_decoding
from las_fast.errors import InputError, show
from las_fast.files import first_line, prepare_output_file
from las_fast.options import Parser, parse_settings
from las_fast.search.ngram import with_default_weight
from las_fast.splits import add_utterance_options, check_fits, load_splits
from las_fast.system import choose_device, return_freed_memory
from las_fast.text import remedy

if TYPE_CHECKING:  # importing torch would slow down --help
    from las_fast.checkpoint import Loaded
    from las_fast.data.corpus import Corpus
    from las_fast.data.dataset import SpeechDataset
    from las_fast.output.metrics import Scores
    from las_fast.output.transcripts import Word
    from las_fast.search.beam import TokenHypothesis

MAX_LISTED = 20  # unknown characters listed in an error
LONG_SECONDS = 60  # of an utterance in which a model may lose its place: it was trained on shorter ones


def parser() -> Parser:
    parser = Parser(prog="python -m las_fast.decode", description=__doc__, add_help=False)
    parser.add_argument(
        "--checkpoint", required=True, metavar="RUN|FILE|NAME", help="run folder, file or released model"
    )
    parser.add_argument(
        "--data", required=True, type=as_path, metavar="ROOT", help="archive, corpus folder or manifest"
    )
    parser.add_argument("--split", required=True, help="split name, or train, dev or test; join several with +")
    parser.add_argument("--out", required=True, type=as_file, metavar="FILE.csv", help="submission file to write")
    add_search_options(parser)
    parser.add_argument(
        "--nbest", type=int, default=1, metavar="N", help="maximum hypotheses per utterance in --jsonl (default: 1)"
    )
    parser.add_argument(
        "--jsonl",
        type=as_file,
        metavar="FILE",
        help="also write a JSON line per utterance: scores, attended frames, words and the n best texts",
    )
    add_lm_option(parser)
    add_utterance_options(parser, on_bad="error")
    parser.add_argument(
        "--any-features",
        action="store_true",
        help="accept precomputed features for a checkpoint of recordings, and the reverse",
    )
    add_device_option(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command; see --help. The last line printed is JSON."""
    return_freed_memory()
    loaded: list[Loaded] = []  # filled while parsing, because the checkpoint has the default settings

    def defaults(options: argparse.Namespace) -> DecodingSettings:
        from las_fast.checkpoint import load_model

        check_options(options)
        loaded.append(load_model(options.checkpoint, choose_device(options.device)))
        decoding = with_default_weight(loaded[0], options.lm)
        return DecodingSettings(replace(decoding, **short_values(options)))

    options, settings = parse_settings(parser(), argv, defaults, kind=DecodingSettings)
    check_decoding(loaded[0].config, settings.decoding)
    check_agreement(options, settings.decoding)
    check_nbest(options.nbest, settings.decoding.beam)
    decode(options, loaded[0], settings.decoding)


def short_values(options: argparse.Namespace) -> dict[str, Any]:
    """Return the decoding settings that options such as --beam give, by their names (decoding.beam is also --beam)."""
    values = {name: getattr(options, name) for name in SEARCH_OPTIONS}
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items() if value is not None
    }


def check_agreement(options: argparse.Namespace, decoding: DecodingConfig) -> None:
    """Raise InputError if an option such as --beam has another value than --decoding.beam."""
    for name, short in short_values(options).items():
        long, option = getattr(decoding, name), name.replace("_", "-")
        if short != long:
            raise InputError(
                f"--{option} {as_words(short)} and --decoding.{option} {as_words(long)} disagree; give one of them"
            )


def as_words(value: Any) -> str:
    """Return a setting as it is written on the command line."""
    if isinstance(value, tuple):
        return " ".join(map(as_words, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def check_options(options: argparse.Namespace) -> None:
    """Raise InputError if an option is out of range, or an output file must not be written."""
    check_search_options(options)
    if options.nbest < 1:
        raise InputError(f"--nbest must be at least 1; got {options.nbest}")
    if options.nbest > 1 and not options.jsonl:
        raise InputError(f"--nbest {options.nbest} needs --jsonl FILE, where the hypotheses are written")
    if options.jsonl and os.path.realpath(options.jsonl) == os.path.realpath(options.out):
        raise InputError(f"--out and --jsonl are both {options.out}; give two different files")
    inputs = (options.data, options.checkpoint, options.lm)
    kind: dict[str, Any] = {"what": "a submission in CSV", "suffixes": (".csv", ".txt"), "may_replace": is_submission}
    prepare_output_file(options.out, "--out", inputs=inputs, **kind)
    if options.jsonl:
        kind = {"what": "JSON Lines", "suffixes": (".jsonl", ".json", ".txt"), "may_replace": is_jsonl}
        prepare_output_file(options.jsonl, "--jsonl", inputs=inputs, **kind)


def is_submission(path: Path) -> bool:
    """Return whether a file looks like a submission, from the two columns of its first line."""
    first, _, second = first_line(path).lower().partition(",")
    return first in ("id", "index") and second in ("label", "labels", "predictions", "transcription")


def is_jsonl(path: Path) -> bool:
    """Return whether a file looks like the JSON lines of this command, from its first line."""
    line = first_line(path)
    return re.match(r'\{"id": ("(?:[^"\\]|\\.)*"), "text": "', line) is not None


def decode(options: argparse.Namespace, loaded: Loaded, decoding: DecodingConfig) -> None:
    """Decode options.split, write the files and print the results."""
    from las_fast.data.layouts import open_corpus
    from las_fast.recogniser import Recogniser

    model = Recogniser(loaded, choose_device(options.device), lm_option="--lm ")
    setup = model.search_setup(decoding, options.lm)
    corpus = open_corpus(options.data)
    print(f"data: {corpus.name}")
    check_fits(corpus, loaded, any_features=options.any_features)
    splits = corpus.choose(options.split)
    dataset = load_splits(
        corpus, splits, loaded, on_bad=options.on_bad, normalise_text=options.normalise_text, need_text=False
    )
    normalised = options.normalise_text or loaded.config.data.normalise_text
    check_references(dataset, loaded, normalised=normalised)
    warn_of_long_utterances(dataset)
    started = time.perf_counter()
    hypotheses = model.decode_dataset(dataset, setup, nbest=options.nbest, words=bool(options.jsonl))
    seconds = time.perf_counter() - started
    rows = [jsonl_row(dataset, i, hypotheses[i], loaded) for i in range(len(dataset))]
    write_results(options, corpus, dataset, rows)
    warn_of_fault([row["text"] for row in rows], loaded)
    summary = summarise(dataset, rows, seconds)
    print(format_summary(summary, options.out))
    print(json.dumps(summary))


def warn_of_long_utterances(dataset: SpeechDataset) -> None:
    """Warn if an utterance is so long that models lose their place in it."""
    long = dataset.seconds > LONG_SECONDS
    if long.any():
        i = int(dataset.seconds.argmax())
        print(
            f"warning: {int(long.sum())} of {len(dataset)} utterances are longer than {LONG_SECONDS} s, the longest is "
            f"{show(dataset.ids[i])} ({dataset.seconds[i]:.0f} s); models invent text in long utterances: give parts "
            "by the manifest's columns start and end, or use transcribe, which cuts recordings at pauses",
            file=sys.stderr,
        )


def warn_of_fault(texts: list[str], loaded: Loaded) -> None:
    """Warn if many texts show that the model does not follow the audio."""
    from las_fast.output.faults import describe_fault

    if fault := describe_fault(texts):
        print(
            f"warning: {fault}; checkpoint {loaded.path} does not follow this audio: look at its attention lines in "
            "training, or give data like its training data",
            file=sys.stderr,
        )


def reference(dataset: SpeechDataset, i: int) -> str | None:
    """Return the transcript of an utterance; None if it is missing or blank."""
    text = dataset.texts[i]
    return text if text and text.strip() else None


def check_references(dataset: SpeechDataset, loaded: Loaded, *, normalised: bool) -> None:
    """Raise InputError for characters outside the vocabulary, each of which would count as an error of the model.

    normalised: whether the transcripts have been mapped to the vocabulary, so that --normalise-text is no advice.
    """
    unknown = {i: loaded.vocabulary.unknown(reference(dataset, i) or "") for i in range(len(dataset))}
    affected = [i for i, characters in unknown.items() if characters]
    if not affected:
        return
    characters = sorted({character for i in affected for character in unknown[i]})
    more = f" and {len(characters) - MAX_LISTED} more" if len(characters) > MAX_LISTED else ""
    raise InputError(
        f"{len(affected)} of {len(dataset)} transcripts, first that of {dataset.ids[affected[0]]}, have characters "
        f"outside the checkpoint's vocabulary: {' '.join(map(repr, characters[:MAX_LISTED]))}{more}; "
        + ("write digits as words in the transcripts" if normalised else remedy(characters, "--normalise-text"))
    )


def jsonl_row(dataset: SpeechDataset, i: int, hypotheses: list[TokenHypothesis], loaded: Loaded) -> dict:
    """Return the row of utterance i for --jsonl; frames and times are those of the untrimmed recording."""
    from las_fast.data.features import seconds_of
    from las_fast.output.formats import rounded, word_row

    best, frame_shift = hypotheses[0], float(seconds_of(1, loaded.config.features))
    nbest = [
        {
            "text": loaded.vocabulary.decode(h.text_tokens),
            "score": rounded(h.score),
            "words": [word_row(word) for word in recording_words(dataset, i, h.words, frame_shift)],
        }
        for h in hypotheses
    ]
    reduction = loaded.model.time_reduction  # feature frames per encoder frame
    middles = (frame * reduction + reduction // 2 for frame in best.attended_frames)  # feature frames
    frames = [dataset.recording_frame(i, middle) // reduction for middle in middles]
    row = {"id": dataset.ids[i], **nbest[0], "frames": frames, "nbest": nbest}
    text = reference(dataset, i)
    return row if text is None else {**row, "reference": text}


def recording_words(dataset: SpeechDataset, i: int, words: tuple[Word, ...], frame_shift: float) -> list[Word]:
    """Convert word times from the features, which lack trimmed silence, to the recording.

    frame_shift: seconds between feature frames.
    """

    def convert(seconds: float, *, is_end: bool) -> float:
        frame = math.ceil(seconds / frame_shift) - 1 if is_end else math.floor(seconds / frame_shift)
        frame = max(frame, 0)
        trimmed = (dataset.recording_frame(i, frame) - frame) * frame_shift
        return min(seconds + trimmed, float(dataset.seconds[i]))

    return [
        replace(word, start=convert(word.start, is_end=False), end=convert(word.end, is_end=True)) for word in words
    ]


def write_results(options: argparse.Namespace, corpus: Corpus, dataset: SpeechDataset, rows: list[dict]) -> None:
    """Write the submission and the JSON lines; a skipped utterance has an empty text in the submission only."""
    from las_fast.files import write_text_atomically
    from las_fast.output.submission import write_submission

    texts = [""] * len(dataset.listing)
    shared = False  # whether the dataset has prefixed ids with their splits, because splits share ids
    for position, row in zip(dataset.positions.tolist(), rows, strict=True):
        texts[position] = row["text"]
        shared = shared or row["id"] != dataset.listing[position][1]
    names = [f"{split}/{name}" if shared else name for split, name in dataset.listing]
    write_submission(options.out, names, texts, header=corpus.header, numbered=corpus.numbered)
    if options.jsonl:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text_atomically(options.jsonl, lines)


def summarise(dataset: SpeechDataset, rows: list[dict], seconds: float) -> dict:
    """Return the values of the last line printed: counts, scores if there are transcripts, times and speed."""
    from las_fast.output.metrics import score

    audio_seconds = math.fsum(dataset.seconds)
    with_text = [row for row in rows if "reference" in row]
    result: dict[str, float] = {"utterances": len(rows)}
    if dataset.skipped:
        result["skipped"] = len(dataset.skipped)
    if 0 < len(with_text) < len(rows):
        result["scored"] = len(with_text)
    if with_text:
        scores: Scores = score([row["reference"] for row in with_text], [row["text"] for row in with_text])
        result |= {name: round(value, 4) for name, value in asdict(scores).items() if name != "utterances"}
    times = {"seconds": seconds, "audio_seconds": audio_seconds, "rtfx": audio_seconds / max(seconds, 1e-9)}
    return result | {name: round(value, 3) for name, value in times.items()}


def format_summary(result: dict, out: Path) -> str:
    """Format the values of `summarise` as a table."""
    lines = [("utterances", f"{result['utterances']}")]
    if "skipped" in result:
        lines.append(("left out", f"{result['skipped']} that could not be used; their rows in {out.name} are empty"))
    if "scored" in result:
        without = result["utterances"] - result["scored"]
        lines.append(("scored", f"{result['scored']}; the other {without} have no transcript"))
    if "ld" in result:
        lines += [
            ("LD", f"{result['ld']:.2f} characters per utterance"),
            ("CER", f"{result['cer']:.2f} %"),
            ("WER", f"{result['wer']:.2f} %"),
        ]
    speed = f"{result['audio_seconds']:.0f} s of audio in {result['seconds']:.1f} s, {result['rtfx']:.0f} x real time"
    lines += [("speed", speed), ("written", f"{out}")]
    return "\n".join(f"{name:<12}{value}" for name, value in lines)


if __name__ == "__main__":
    run(main)
