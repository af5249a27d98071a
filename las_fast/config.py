"""Settings as frozen dataclasses, read from YAML without forgiveness: a misspelt key or a wrong type is an error."""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from las_fast import plain_yaml
from las_fast.errors import InputError
from las_fast.plain_yaml import got
from las_fast.text import CHARACTERS, Vocabulary

if TYPE_CHECKING:  # these import torch, which --help need not wait for
    pass


PRESETS = Path(__file__).parent / "configs"
MOST = 10**9  # what no number may exceed where its field says nothing


@dataclass(frozen=True)
class Bounds:
    """Limits of a number, or of each number in a tuple."""

    at_least: float = 0
    above: float = -math.inf
    at_most: float = MOST
    below: float = math.inf

    def broken(self, value: int | float) -> str:
        """Return what the value must be, such as "at least 1", where it is not, else ""."""
        if isinstance(value, float) and not math.isfinite(value):
            return "a finite number"
        if value <= self.above:
            return f"more than {self.above:g}"
        if value < self.at_least:
            return f"at least {self.at_least:g}"
        if value > self.at_most:
            return f"at most {self.at_most:g}"
        return f"below {self.below:g}" if value >= self.below else ""


def number(default: Any = dataclasses.MISSING, **bounds: float) -> Any:
    """A field that holds a number, or several, within `Bounds(**bounds)`."""
    return field(default=default, metadata={"bounds": Bounds(**bounds)})


@dataclass(frozen=True)
class FeatureConfig:
    """What a frame is."""

    kind: Literal["logmel", "mfcc"] = "logmel"  # computed from audio; archives of features bring their own
    # values per frame before deltas: mel bins, cepstral coefficients, or the archive's own
    size: int = number(80, at_least=1, at_most=10_000)
    mel_bins: int = number(80, at_least=1, at_most=10_000)  # filters under the MFCC
    sample_rate: int = number(16000, at_least=1, at_most=768_000)  # Hz; audio at another rate is resampled
    window_ms: float = number(25.0, above=0, at_most=1000)
    shift_ms: float = number(10.0, above=0, at_most=1000)
    normalisation: Literal["utterance", "global", "none"] = "utterance"
    trim_silence: bool = True  # of recordings: long silence is left out, and what is kept of it has one level
    deltas: int = 0  # 0, 1 (speed) or 2 (speed and acceleration)

    @property
    def input_size(self) -> int:
        """Values per frame that the model sees."""
        return self.size * (1 + self.deltas)


@dataclass(frozen=True)
class DataConfig:
    """Which utterances, and how they are batched."""

    train: tuple[str, ...] = ()  # split names; empty: every training split the data has
    dev: str = ""  # split name; empty: the development split the data has
    characters: str = CHARACTERS
    normalise_text: bool = False  # map transcripts onto the characters instead of refusing them
    on_bad: Literal["error", "skip"] = "error"
    frames_per_batch: int = number(20000, at_least=1, at_most=10_000_000)  # feature frames, padding included
    utterances_per_batch: int = number(64, at_least=1, at_most=10_000)  # at most
    max_seconds: float = 0.0  # longer training utterances are left out and counted; 0: no limit
    hours: float = 0.0  # train on this much, drawn once: what is in 1 hour is in 3 too; 0: on all
    short_epochs: int = 0  # at the start, on utterances of at most short_seconds: attention forms on them sooner
    short_seconds: float = 4.0
    cache: str = ""  # folder of the feature cache; empty: the user's cache folder
    workers: int = number(1, at_most=256)  # loader processes; 0 loads in the training process

    def whole(self) -> DataConfig:
        """Return the settings for data to be scored: nothing is left out of it."""
        return dataclasses.replace(self, max_seconds=0.0, hours=0.0)


@dataclass(frozen=True)
class AugmentConfig:
    """SpecAugment (Park et al. 2019) and speed, on features, in training only."""

    start_epoch: float = 0.0  # epochs before masks and joins begin: attention forms sooner on whole utterances
    time_masks: int = number(2, at_most=1000)
    time_width: int = 40  # frames at most
    time_share: float = number(0.2, at_most=1)  # of an utterance that all time masks together may take
    frequency_masks: int = number(2, at_most=1000)
    frequency_width: int = 10  # bins at most
    frequency_share: float = number(0.5, at_most=1)  # of the bins that all frequency masks together may take
    speed: float = number(0.0, below=1)  # 0.1: each utterance is played between 0.9 and 1.1 times its speed
    # share of batches whose utterances are joined in pairs: new texts, twice as long
    join: float = number(0.0, at_most=1)


@dataclass(frozen=True)
class ListenerConfig:
    """Encoder: convolution, one BiLSTM, then BiLSTMs that each halve the time, then some that keep it."""

    conv_channels: tuple[int, ...] = number((256,), at_least=1, at_most=10_000)
    conv_kernels: tuple[int, ...] = number((5,), at_least=1, at_most=101)  # odd, one per layer
    conv_strides: tuple[int, ...] = number((1,), at_least=1, at_most=16)  # one per layer
    lstm_size: int = number(256, at_least=1, at_most=10_000)  # per direction
    pyramids: int = number(3, at_most=8)
    top_layers: int = number(0, at_most=100)  # BiLSTMs after the pyramids
    dropout: float = number(0.2, below=1)  # locked: one mask per utterance, the same in every frame

    @property
    def time_reduction(self) -> int:
        """Feature frames in one encoder frame."""
        return self.reduction_at(self.pyramids)

    def reduction_at(self, layer: int) -> int:
        """Feature frames in one frame of BiLSTM `layer`, counted as ModelConfig.ctc_layer counts."""
        return math.prod(self.conv_strides) * 2 ** min(layer, self.pyramids)


@dataclass(frozen=True)
class SpellerConfig:
    """Decoder: embedding tied to the output, LSTM cells, masked dot-product attention."""

    key_size: int = number(256, at_least=1, at_most=10_000)
    value_size: int = number(256, at_least=1, at_most=10_000)
    embedding_size: int = number(256, at_least=1, at_most=10_000)
    lstm_sizes: tuple[int, ...] = number((512, 256), at_least=1, at_most=10_000)
    dropout: float = number(0.2, below=1)


@dataclass(frozen=True)
class ModelConfig:
    listener: ListenerConfig = field(default_factory=ListenerConfig)
    speller: SpellerConfig = field(default_factory=SpellerConfig)
    # BiLSTM that carries a CTC head: 0 the first, i the i-th pyramid, then the top ones; -1 none
    ctc_layer: int = number(-1, at_least=-1)


@dataclass(frozen=True)
class TeacherForcingStage:
    """From `start` to `end` (epochs) the share of true previous tokens goes straight from `first` to `last`."""

    start: float
    end: float
    first: float = number(at_most=1)
    last: float = number(at_most=1)


@dataclass(frozen=True)
class TrainingConfig:
    epochs: int = number(60, at_least=1, at_most=1_000_000)
    learning_rate: float = number(1e-3, above=0, at_most=100)
    weight_decay: float = 1e-2
    warmup_steps: int = 200
    schedule: Literal["cosine", "plateau", "constant"] = "cosine"
    final_share: float = number(0.02, at_most=1)  # of the learning rate at the end of the cosine
    # epochs after which the cosine begins again, warm-up and all (warm restarts)
    restarts: tuple[int, ...] = number((), at_least=1)
    plateau_patience: int = 4  # validations without a better dev CER
    plateau_factor: float = number(0.5, above=0, at_most=1)
    clip_norm: float = number(5.0, above=0)
    label_smoothing: float = number(0.1, below=1)
    ctc_weight: float = number(0.0, at_most=1e6)  # needs model.ctc_layer
    ctc_until: float = 0.0  # epoch from which the CTC weight is 0; 0: never
    # soft prior on the attention: along the diagonal, or along CTC's alignment
    guided_weight: float = number(0.0, at_most=1e6)
    guided_width: float = number(0.15, above=0)  # of the diagonal, as a share of the utterance
    guided_frames: float = 0.0  # how near to CTC's alignment the prior wants it, in encoder frames; 0: diagonal
    guided_until: float = 10.0  # epoch at which the prior has faded to nothing
    teacher_forcing: tuple[TeacherForcingStage, ...] = (
        TeacherForcingStage(start=0.0, end=20.0, first=1.0, last=1.0),
        TeacherForcingStage(start=20.0, end=40.0, first=1.0, last=0.8),
        TeacherForcingStage(start=40.0, end=60.0, first=0.8, last=0.6),
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 where its matmuls are faster
    # CPU threads per op; 0: all cores. Tiny models gain nothing from more than one
    threads: int = number(0, at_most=1024)
    ema_decay: float = number(0.999, below=1)  # averaged weights; 0: none
    seed: int = number(1, at_most=10**12)  # times a million it must still be a seed
    validate_every: float = number(1.0, above=0)  # epochs
    checkpoint_minutes: float = 5.0  # between saves inside an epoch
    pictures: int = number(2, at_most=1000)  # dev utterances whose attention is drawn at each validation
    monitor_epoch: float = 10.0  # by when the attention should have formed
    wandb: bool = False


@dataclass(frozen=True)
class DecodingConfig:
    beam: int = number(8, at_least=1, at_most=1000)
    length_penalty: float = number(1.0, at_most=100)  # scores are ranked by score / length ** length_penalty
    eos_threshold: float = 0.0  # eos only where its log-probability > threshold * best other; 0: always
    minimum_share: float = 0.0  # tokens per feature frame, at least
    # tokens per feature frame, at most; fast speech has 25 characters per second
    maximum_share: float = number(0.3, at_most=1000)
    maximum_extra: int = number(10, at_most=1_000_000)  # tokens allowed besides the maximum share
    coverage_weight: float = 0.0  # of the mean log of the attention that a frame got, at most 1; 0: none, 0.1 is much
    # of the CTC head's prefix scores, up to 1; the speller's have the rest. 0 needs no head
    ctc_weight: float = number(0.0, at_most=1)
    ngram_weight: float = 0.0  # of an n-gram model's log-probabilities, where the search is given one
    # added to a score for each character, natural log units; weighs against an n-gram model
    length_reward: float = number(0.0, at_least=-1e6, at_most=1e6)
    frames_per_batch: int = number(30000, at_least=1, at_most=10_000_000)  # feature frames, padding included
    precision: Literal["auto", "fp32", "bf16", "int8"] = "auto"  # in decoding on a CPU; int8: the speller's; auto: fp32


@dataclass(frozen=True)
class Config:
    features: FeatureConfig = field(default_factory=FeatureConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)


def presets() -> list[str]:
    """Names that --config takes besides a file."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_config(name: str | Path) -> Config:
    """Return the preset of that name, or the YAML file at that path; raise InputError on any mistake in it."""
    path = PRESETS / f"{name}.yaml" if str(name) in presets() else Path(name)
    tree = plain_yaml.load(_read(path), str(path))
    return check(from_tree(Config, {} if tree is None else tree, str(path)))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(str(path), presets(), 1) or presets()
        what = f"--config {path}: no such preset or file; did you mean {' or '.join(near)}?"
        beside = [file for file in (Path(f"{path}.yaml"), Path(f"{path}.yml")) if file.is_file()]
        raise InputError(f"--config {path}: no such preset or file; give {beside[0]}" if beside else what) from None
    except IsADirectoryError:
        inside = path / "config.yaml"
        advice = f"give {inside}" if inside.is_file() else "give a YAML file in it, or a preset"
        raise InputError(f"--config {path} is a folder; {advice}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not YAML: {error}; give a text file in UTF-8") from None
    except OSError as error:
        raise InputError(f"--config {path} cannot be read ({error.strerror}); give a file that can") from None


def to_tree(config: Any) -> Any:
    """Return a dataclass as plain dicts, lists and scalars, ready for YAML."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_tree(getattr(config, f.name)) for f in dataclasses.fields(config)}
    return [to_tree(item) for item in config] if isinstance(config, tuple) else config


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(to_tree(config), sort_keys=False)


def from_yaml(text: str, where: str) -> Config:
    """Return the Config that to_yaml wrote; `where` names it in errors."""
    return check(from_tree(Config, plain_yaml.load(text, where), where))


def from_tree(kind: Any, tree: Any, where: str) -> Any:
    """Build `kind` from plain data, strictly: unknown keys and ill-typed values raise InputError naming `where`.

    Values are as to_tree gives them, or Plain texts that a file holds without quotes.
    """
    if dataclasses.is_dataclass(kind):
        return _dataclass_from_tree(kind, tree, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if tree not in arguments:
            raise InputError(f"{where} must be one of {', '.join(map(repr, arguments))}; got {got(tree)}")
        return str(tree)
    if origin is tuple:
        if not isinstance(tree, list):
            raise InputError(f"{where} must be a list; got {got(tree)}")
        return tuple(from_tree(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(tree))
    value = _from_plain(kind, tree) if isinstance(tree, plain_yaml.Plain) else tree
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise InputError(f"{where} must be {kind.__name__}; got {got(tree)}{_hint(kind, tree)}")
    return value


def _from_plain(kind: type, text: plain_yaml.Plain) -> Any:
    """Return what a text without quotes means where a value of `kind` is wanted, the text where that is nothing."""
    value: Any = text
    if kind is str:
        value = str(text)
    elif kind is bool:
        value = plain_yaml.parse_bool(text)
    elif kind in (int, float):
        value = plain_yaml.parse_number(text, kind)
    return text if value is None else value


def _hint(kind: type, tree: Any) -> str:
    if kind not in (int, float) or not isinstance(tree, plain_yaml.Plain):
        return ""
    if tree.lstrip("+-").startswith("0"):
        return "; write it in decimal, without a leading zero"
    return "; write minutes and hours as one number" if ":" in tree else ""


def _dataclass_from_tree(kind: Any, tree: Any, where: str) -> Any:
    if tree is None:  # a section all of whose lines are commented out
        tree = {}
    if not isinstance(tree, dict):
        raise InputError(f"{where} must be a mapping of settings; got {got(tree)}")
    hints = typing.get_type_hints(kind)
    for key in tree:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, 1, cutoff=0.0)[0]
            raise InputError(f"{where} has no setting {got(str(key))}; the nearest is {near!r}")
    missing = [f.name for f in dataclasses.fields(kind) if f.name not in tree and _required(f)]
    if missing:
        raise InputError(f"{where} lacks {', '.join(missing)}")
    return kind(**{key: from_tree(hints[key], value, f"{where}: {key}") for key, value in tree.items()})


def _required(f: dataclasses.Field) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


NO_HEAD = "needs a model with a CTC head: model.ctc_layer of 0 or more"


def check(config: Config) -> Config:
    """Return config if its values make sense, alone and together; raise InputError naming the field if not."""
    Vocabulary(config.data.characters)
    for name, value, bounds in _numbers(config):
        if wrong := bounds.broken(value):
            raise InputError(f"settings: {name} must be {wrong}; got {value}")
    listener, training, model = config.model.listener, config.training, config.model
    layers = {len(listener.conv_channels), len(listener.conv_kernels), len(listener.conv_strides)}
    rules = [
        (len(layers) == 1, "model.listener.conv_channels, conv_kernels and conv_strides must be equally long"),
        (all(k % 2 for k in listener.conv_kernels), "model.listener.conv_kernels must be odd"),
        (
            -1 <= model.ctc_layer <= listener.pyramids + listener.top_layers,
            "model.ctc_layer must be from -1 to model.listener.pyramids + model.listener.top_layers",
        ),
        (training.ctc_weight == 0 or model.ctc_layer >= 0, "training.ctc_weight needs model.ctc_layer of 0 or more"),
        (training.guided_frames == 0 or model.ctc_layer >= 0, f"training.guided_frames {NO_HEAD}"),
        (config.decoding.ctc_weight == 0 or model.ctc_layer >= 0, f"decoding.ctc_weight {NO_HEAD}"),
        (config.features.deltas in (0, 1, 2), "features.deltas must be 0, 1 or 2"),
        (len(config.model.speller.lstm_sizes) >= 1, "model.speller.lstm_sizes must name at least one cell"),
        (not training.restarts or training.schedule == "cosine", "training.restarts needs training.schedule cosine"),
        (
            all(a < b for a, b in pairwise((*training.restarts, training.epochs))),
            f"training.restarts must rise and end below training.epochs; got {[*training.restarts]} and "
            f"{training.epochs}; --training.restarts with nothing after it is none",
        ),
        (all(s.start <= s.end for s in training.teacher_forcing), "training.teacher_forcing stages need start <= end"),
    ]
    for holds, message in rules:
        if not holds:
            raise InputError(f"settings: {message}")
    return config


def check_decoding(config: Config, decoding: DecodingConfig) -> DecodingConfig:
    """Return the settings of a search if they make sense for a checkpoint's config; raise InputError if not."""
    return check(dataclasses.replace(config, decoding=decoding)).decoding


def _numbers(config: Any, name: str = "", bounds: Bounds = Bounds()) -> Iterator[tuple[str, int | float, Bounds]]:
    """Yield the dotted name, the value and the bounds of each number; items of a tuple go by the tuple's name."""
    if dataclasses.is_dataclass(config):
        for f in dataclasses.fields(config):
            inner = f.metadata.get("bounds", Bounds())
            yield from _numbers(getattr(config, f.name), f"{name}.{f.name}".lstrip("."), inner)
    elif isinstance(config, tuple):
        for item in config:
            yield from _numbers(item, name, bounds)
    elif isinstance(config, (int, float)) and not isinstance(config, bool):
        yield name, config, bounds


@dataclass(frozen=True)
class DecodingSettings:
    """What the command line of a decoding command may change of the checkpoint's settings."""

    decoding: DecodingConfig = field(default_factory=DecodingConfig)
