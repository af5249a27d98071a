"""Settings: frozen dataclasses, read strictly from YAML. A misspelt key or a wrong type is an error.

The comment of each field is its text in --help: meaning and unit.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from las_fast import plain_yaml
from las_fast.errors import InputError
from las_fast.files import expand
from las_fast.text import CHARACTERS, Vocabulary
from las_fast.tree import flatten, from_tree, to_tree

PRESETS = Path(__file__).parent / "configs"
MAX_NUMBER = 10**9  # upper bound of numbers whose field does not set one
MAX_BEAM = 1000
Precision = Literal["auto", "fp32", "bf16", "int8"]  # of decoding
PRECISIONS = get_args(Precision)
VADS = ("energy", "silero")  # how recordings are cut; see las_fast.data.vad
NEEDS_CTC_HEAD = "needs a model with a CTC head: model.ctc_layer of 0 or more"


@dataclass(frozen=True)
class Bounds:
    """Bounds of a number, or of each number in a tuple; the defaults are those of a field without bounds."""

    at_least: float = 0
    above: float = -math.inf
    at_most: float = MAX_NUMBER
    below: float = math.inf

    def violated(self, value: int | float) -> str:
        """Return the bound that a value violates, such as "at least 1", or ""."""
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
    """Return a field for a number, or a tuple of numbers, within Bounds(**bounds)."""
    return field(default=default, metadata={"bounds": Bounds(**bounds)})


@dataclass(frozen=True)
class FeatureConfig:
    """Acoustic features: one frame of values per shift_ms."""

    # kind of features to compute from audio; archives of features are used as they are
    kind: Literal["logmel", "mfcc"] = "logmel"
    # values per frame, without deltas: mel bins, cepstral coefficients, or the size of the archive's frames
    size: int = number(80, at_least=1, at_most=10_000)
    mel_bins: int = number(80, at_least=1, at_most=10_000)  # mel filters that MFCC are computed from
    # MFCC k is multiplied by 1 + lifter / 2 * sin(pi * k / lifter); 0: by 1. For an archive, only warping uses it
    lifter: float = number(22.0, at_most=1000)
    sample_rate: int = number(16000, at_least=1, at_most=768_000)  # Hz; audio at another rate is resampled
    window_ms: float = number(25.0, above=0, at_most=1000)  # length of the analysis window, milliseconds
    shift_ms: float = number(10.0, above=0, at_most=1000)  # time from one frame to the next, milliseconds
    # normalise features with statistics of the utterance or of the training set (global), or not at all
    normalisation: Literal["utterance", "global", "none"] = "utterance"
    # for recordings: cut long silences short, and bring the silence that stays to one level
    trim_silence: bool = True
    deltas: int = 0  # orders of time derivatives to append: 0, 1 (speed) or 2 (speed and acceleration)

    @property
    def input_size(self) -> int:
        """Values per frame, deltas included."""
        return self.size * (1 + self.deltas)


@dataclass(frozen=True)
class DataConfig:
    """Choice of utterances, and batches."""

    train: tuple[str, ...] = ()  # names of the training splits; empty: all training splits of the data
    dev: str = ""  # name of the development split; empty: the one of the data
    characters: str = CHARACTERS  # the vocabulary, besides <eos>
    normalise_text: bool = False  # map transcripts onto the vocabulary instead of refusing other characters
    on_bad: Literal["error", "skip"] = "error"  # stop at an unusable utterance, or leave it out
    # maximum feature frames, with padding to the longest utterance; training pads further, to a multiple of 32
    frames_per_batch: int = number(20000, at_least=1, at_most=10_000_000)
    utterances_per_batch: int = number(64, at_least=1, at_most=10_000)  # maximum utterances
    max_seconds: float = 0.0  # leave out longer training utterances, seconds; 0: no limit
    # hours of training data, the same utterances in every epoch; more hours include those of fewer; 0: all
    hours: float = 0.0
    # epochs at the start on short utterances only, where attention forms sooner; 0: none
    short_epochs: int = 0
    short_seconds: float = 4.0  # longest utterance in those epochs, seconds
    # drop: leave out training utterances whose transcript is that of a dev utterance, or shares six words in a row with
    # one
    shared_texts: Literal["keep", "drop"] = "keep"
    # share of the training recordings to hold out as the dev set; 0: use the dev split of the data
    dev_share: float = number(0.0, at_most=0.5)
    cache: str = ""  # folder of the feature cache; empty: the user's cache folder
    workers: int = number(1, at_most=256)  # loader processes; 0: load in the training process

    def without_limits(self) -> DataConfig:
        """Return the settings without max_seconds and hours, which must not leave out data that is scored."""
        return dataclasses.replace(self, max_seconds=0.0, hours=0.0)


@dataclass(frozen=True)
class AugmentConfig:
    """SpecAugment (Park et al. 2019), changes of speed, frequency and words, joins, silence, rooms and noise.

    All of it is done in training only.

    silence, room, noise, babble and band_limit need log-mel features computed from recordings.
    """

    # epoch at which all of these but speed and splice start: attention forms sooner without them
    start_epoch: float = 0.0
    time_masks: int = number(2, at_most=1000)  # masks per utterance over spans of time
    time_width: int = 40  # widest time mask, feature frames
    time_share: float = number(0.2, at_most=1)  # largest share of an utterance under all its time masks
    frequency_masks: int = number(2, at_most=1000)  # masks per utterance over bands of frequency
    frequency_width: int = 10  # widest frequency mask, bins
    frequency_share: float = number(0.5, at_most=1)  # largest share of the bins under all frequency masks
    # largest relative change of speed, drawn per utterance: 0.1 gives 0.9 to 1.1 times the speed
    speed: float = number(0.0, below=1)
    # largest relative change of frequencies, as of another speaker's, drawn per utterance: 0.1 gives 0.9 to 1.1 times.
    # For an archive, features.kind, sample_rate, mel_bins and lifter must be those of its features
    warp: float = number(0.0, at_most=0.5)
    # share of batches whose utterances are joined in pairs: new texts, twice as long
    join: float = number(0.0, at_most=1)
    # share of utterances in which a quarter of the words, on average, are replaced by words of other utterances
    # (Lam et al. 2021)
    splice: float = number(0.0, at_most=1)
    # at the start of this epoch the CTC head aligns all words, and replacement begins, whatever start_epoch is
    splice_epoch: int = 0
    silence: float = number(0.0, at_most=1)  # share of utterances with up to 100 frames of silence added at each end
    room: float = number(0.0, at_most=1)  # share of utterances with the reverberation of a simulated room
    noise: float = number(0.0, at_most=1)  # share of utterances with noise of a random colour and level
    babble: float = number(0.0, at_most=1)  # share of utterances with several other utterances in the background
    snr_low: float = number(0.0, at_least=-30, at_most=100)  # lowest ratio of speech to noise or babble, dB
    snr_high: float = number(30.0, at_least=-30, at_most=100)  # highest ratio of speech to noise or babble, dB
    band_limit: float = number(0.0, at_most=1)  # share of utterances with a limited band, as of a telephone or old film


@dataclass(frozen=True)
class ListenerConfig:
    """Encoder: convolutions, a BiLSTM, pyramids (BiLSTMs that halve the frame rate), then BiLSTMs that keep it."""

    # output channels of each convolution
    conv_channels: tuple[int, ...] = number((256,), at_least=1, at_most=10_000)
    # width of each convolution in frames, odd
    conv_kernels: tuple[int, ...] = number((5,), at_least=1, at_most=101)
    # time reduction of each convolution
    conv_strides: tuple[int, ...] = number((1,), at_least=1, at_most=16)
    lstm_size: int = number(256, at_least=1, at_most=10_000)  # units of each BiLSTM, per direction
    pyramids: int = number(3, at_most=8)  # BiLSTMs that halve time
    top_layers: int = number(0, at_most=100)  # BiLSTMs after the pyramids
    dropout: float = number(0.2, below=1)  # rate; locked: one mask per utterance, the same in every frame

    @property
    def time_reduction(self) -> int:
        """Feature frames per encoder frame."""
        return self.reduction_at(self.pyramids)

    def reduction_at(self, layer: int) -> int:
        """Feature frames per output frame of BiLSTM `layer`, numbered as in ModelConfig.ctc_layer."""
        return math.prod(self.conv_strides) * 2 ** min(layer, self.pyramids)


@dataclass(frozen=True)
class SpellerConfig:
    """Decoder: embedding tied to the output, LSTM cells, masked dot-product attention."""

    key_size: int = number(256, at_least=1, at_most=10_000)  # size of queries and keys
    value_size: int = number(256, at_least=1, at_most=10_000)  # size of values and contexts
    embedding_size: int = number(256, at_least=1, at_most=10_000)  # size of token embeddings
    # units of each LSTM cell, from the first to the last
    lstm_sizes: tuple[int, ...] = number((512, 256), at_least=1, at_most=10_000)
    dropout: float = number(0.2, below=1)  # rate; locked: one mask per utterance, the same at every step


@dataclass(frozen=True)
class ModelConfig:
    listener: ListenerConfig = field(default_factory=ListenerConfig)
    speller: SpellerConfig = field(default_factory=SpellerConfig)
    # BiLSTM that carries a CTC head: 0 the first, i the i-th pyramid, then the top layers; -1: no head
    ctc_layer: int = number(-1, at_least=-1)
    # lower BiLSTM with a second CTC head, in training only, which helps the upper head to learn; -1: none
    inner_ctc_layer: int = number(-1, at_least=-1)


@dataclass(frozen=True)
class TeacherForcingStage:
    """From epoch `start` to `end`, the share of true previous tokens changes linearly from `first` to `last`."""

    start: float  # epoch
    end: float  # epoch
    first: float = number(at_most=1)  # share of true previous tokens at `start`
    last: float = number(at_most=1)  # share of true previous tokens at `end`


@dataclass(frozen=True)
class TrainingConfig:
    epochs: int = number(60, at_least=1, at_most=1_000_000)  # passes over the training data
    learning_rate: float = number(1e-3, above=0, at_most=100)  # peak, of AdamW
    weight_decay: float = 1e-2  # of AdamW; biases, gains and the embedding have none
    # steps of linear warm-up to the peak learning rate, but at most a tenth of the run (or cycle, with restarts)
    warmup_steps: int = 200
    schedule: Literal["cosine", "plateau", "constant"] = "cosine"  # learning rate after warm-up
    # minimum learning rate of cosine and plateau, as a share of the peak
    final_share: float = number(0.02, at_most=1)
    # epochs after which the cosine starts again, warm-up included (warm restarts)
    restarts: tuple[int, ...] = number((), at_least=1)
    # validations in a row without a better dev CER that are tolerated; the next one lowers the learning rate
    plateau_patience: int = 4
    plateau_factor: float = number(0.5, above=0, at_most=1)  # factor on the learning rate at each lowering
    clip_norm: float = number(5.0, above=0)  # maximum norm of the gradient
    label_smoothing: float = number(0.1, below=1)  # share of the target probability spread over all tokens
    ctc_weight: float = number(0.0, at_most=1e6)  # weight of the CTC loss of each head; needs model.ctc_layer
    ctc_until: float = 0.0  # epoch from which the CTC weight is 0; 0: never
    # initial weight of the guided attention loss, a prior along the diagonal or along CTC's alignment
    guided_weight: float = number(0.0, at_most=1e6)
    # standard deviation of the diagonal prior, as a share of the utterance
    guided_width: float = number(0.15, above=0)
    # half width, encoder frames, of the prior's window around each CTC token time; 0: diagonal prior instead
    guided_frames: float = 0.0
    guided_until: float = 10.0  # epoch at which the guided weight has faded to 0
    teacher_forcing: tuple[TeacherForcingStage, ...] = (
        TeacherForcingStage(start=0.0, end=20.0, first=1.0, last=1.0),
        TeacherForcingStage(start=20.0, end=40.0, first=1.0, last=0.8),
        TeacherForcingStage(start=40.0, end=60.0, first=0.8, last=0.6),
    )
    # dtype of matmuls; auto: bf16 where its matmuls are faster
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    # CPU threads per op; 0: all cores. Tiny models gain nothing from more than one
    threads: int = number(0, at_most=1024)
    # decay per step of the moving average of the weights, which is validated and saved; 0: no average
    ema_decay: float = number(0.999, below=1)
    seed: int = number(1, at_most=10**12)  # of weights, batches, dropout and augmentation
    validate_every: float = number(1.0, above=0)  # epochs between validations; the end of a cycle is validated, too
    validate_first: bool = False  # validate before the first step too; for a training that starts from a checkpoint
    checkpoint_minutes: float = 5.0  # minutes between saves within an epoch
    pictures: int = number(2, at_most=1000)  # dev utterances whose attention is drawn at each validation
    monitor_epoch: float = 10.0  # epoch from which the monitor gives advice if the attention has not formed
    wandb: bool = False  # log to Weights & Biases too


@dataclass(frozen=True)
class DecodingConfig:
    beam: int = number(8, at_least=1, at_most=MAX_BEAM)  # hypotheses kept at each step; 1: greedy
    beam_threshold: float = 3.5  # hypotheses more than this many nats below the best are dropped; 0: none
    length_penalty: float = number(1.0, at_most=100)  # hypotheses are ranked by score / length ** length_penalty
    # <eos> is allowed only if its log-probability is above this factor times that of the best other; 0: always
    eos_threshold: float = 0.0
    minimum_share: float = 0.0  # minimum tokens per feature frame
    # maximum tokens per feature frame; fast speech has 25 characters per second
    maximum_share: float = number(0.3, at_most=1000)
    maximum_extra: int = number(10, at_most=1_000_000)  # tokens allowed beyond maximum_share
    # weight of coverage: mean over frames of log(min(1, attention summed over tokens)); 0.1 is a large value
    coverage_weight: float = 0.0
    # weight of CTC's log-probabilities, 0 to 1; the speller has the rest. Above 0 the model needs a CTC head
    ctc_weight: float = number(0.0, at_most=1)
    ngram_weight: float = 0.0  # weight of the log-probabilities of the n-gram model, if there is one
    # nats added to the score per character, to offset the n-gram model's preference for short texts
    length_reward: float = number(0.0, at_least=-1e6, at_most=1e6)
    # each utterance is decoded at these speeds in turn (2: twice as fast); the text with the highest score is kept
    speeds: tuple[float, ...] = number((1.0,), at_least=0.5, at_most=2)
    # factor on the frequencies at each speed; a single speed or warp applies to all. If one is not 1, features.kind,
    # sample_rate, mel_bins and lifter must be those of an archive's features
    warps: tuple[float, ...] = number((1.0,), at_least=0.5, at_most=1.5)
    # an utterance whose score is at least -view_threshold nats per token is not decoded at further speeds and warps;
    # 0: every utterance is decoded at every speed
    view_threshold: float = number(0.0)
    frames_per_batch: int = number(30000, at_least=1, at_most=10_000_000)  # maximum feature frames, padding included
    # dtype of matmuls; int8 is for the speller on a CPU and implies bf16 for the listener; auto: fp32
    precision: Precision = "auto"

    def attention_only(self) -> DecodingConfig:
        """Return the settings for one search with the speller alone, without CTC and a language model."""
        return dataclasses.replace(self.one_view(), ctc_weight=0.0, ngram_weight=0.0, length_reward=0.0)

    def greedy(self) -> DecodingConfig:
        """Return the settings of greedy search with the speller alone."""
        return dataclasses.replace(self.attention_only(), beam=1)

    def one_view(self) -> DecodingConfig:
        """Return the settings for a single search, without other speeds and warps."""
        return dataclasses.replace(self, speeds=(1.0,), warps=(1.0,))


@dataclass(frozen=True)
class Config:
    features: FeatureConfig = field(default_factory=FeatureConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)


def presets() -> list[str]:
    """Return the names of the presets."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_config(name: str | Path) -> Config:
    """Load a preset by name or a YAML file by path; raise InputError on any mistake in it."""
    return load_settings(name)[0]


def load_settings(name: str | Path, base: Config | None = None) -> tuple[Config, frozenset[str]]:
    """Load a preset by name or a YAML file by path.

    Args:
        base: settings that the preset or file leaves unchanged where it is silent; by default those of Config().

    Returns:
        The settings, and the names of those that the user has set: of the file, such as "training.epochs"; for a
        preset none.

    Raises:
        InputError: a mistake in the file.
    """
    is_preset = str(name) in presets()
    path = PRESETS / f"{name}.yaml" if is_preset else expand(name)
    tree = plain_yaml.load(_read(path), str(path))
    tree = {} if tree is None else tree
    config = from_tree(Config, tree, str(path))  # names mistakes by the file's keys
    names = frozenset(key for key, _ in flatten(tree))
    if base is not None:
        given = dict(flatten(to_tree(config)))
        config = with_settings(base, {key: given[key] for key in names})
    return check(config), frozenset() if is_preset else names


def with_settings(config: Config, values: Mapping[str, Any]) -> Config:
    """Return config with some values replaced: plain data by dotted name, such as "training.epochs"."""
    tree = to_tree(config)
    for name, value in values.items():
        section = tree
        *path, key = name.split(".")
        for part in path:
            section = section[part]
        section[key] = value
    return from_tree(Config, tree, "settings")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(str(path), presets(), 1) or presets()
        files = [str(file) for file in (Path(f"{path}.yaml"), Path(f"{path}.yml")) if file.is_file()]
        advice = f"give {files[0]}" if files else f"did you mean {' or '.join(near)}?"
        raise InputError(f"--config {path}: no such preset or file; {advice}") from None
    except IsADirectoryError:
        inside = path / "config.yaml"
        advice = f"give {inside}" if inside.is_file() else "give a YAML file in it, or a preset"
        raise InputError(f"--config {path} is a folder; {advice}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not YAML: {error}; give a text file in UTF-8") from None
    except OSError as error:
        raise InputError(f"--config {path} cannot be read ({error.strerror}); give a readable file") from None


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(to_tree(config), sort_keys=False)


def from_yaml(text: str, where: str) -> Config:
    """Parse YAML written by to_yaml; `where` is its name in errors."""
    return check(from_tree(Config, plain_yaml.load(text, where), where))


def check(config: Config) -> Config:
    """Return config if its values are within bounds and consistent; else raise InputError that names the field."""
    try:
        Vocabulary(config.data.characters)
    except InputError as error:
        raise InputError(f"settings: data.characters: {error}") from None
    for name, value, bounds in _numbers(config):
        if bound := bounds.violated(value):
            raise InputError(f"settings: {name} must be {bound}; got {value}")
    _require([*_model_rules(config), *_feature_rules(config), *_training_rules(config), *_view_rules(config.decoding)])
    return config


Rule = tuple[bool, str]  # whether it is met, and the error if not


def _require(rules: list[Rule]) -> None:
    """Raise InputError with the message of the first rule that is not met."""
    for is_met, message in rules:
        if not is_met:
            raise InputError(f"settings: {message}")


def _model_rules(config: Config) -> list[Rule]:
    model, listener, training = config.model, config.model.listener, config.training
    has_ctc = model.ctc_layer >= 0
    conv_lengths = len(listener.conv_channels), len(listener.conv_kernels), len(listener.conv_strides)
    last_layer = listener.pyramids + listener.top_layers
    return [
        (
            len(set(conv_lengths)) == 1,
            "model.listener.conv_channels, conv_kernels and conv_strides must be equally long; got {}, {} and {} "
            "values".format(*conv_lengths),
        ),
        (
            all(k % 2 for k in listener.conv_kernels),
            f"model.listener.conv_kernels must be odd; got {[*listener.conv_kernels]}",
        ),
        (
            -1 <= model.ctc_layer <= last_layer,
            f"model.ctc_layer must be from -1, no CTC head, to {last_layer}, the last BiLSTM; got {model.ctc_layer}",
        ),
        (
            model.inner_ctc_layer == -1 or model.inner_ctc_layer < model.ctc_layer,
            f"model.inner_ctc_layer must be below model.ctc_layer ({model.ctc_layer}), or -1 for none; "
            f"got {model.inner_ctc_layer}",
        ),
        (training.ctc_weight == 0 or has_ctc, f"training.ctc_weight {NEEDS_CTC_HEAD}"),
        (training.guided_frames == 0 or has_ctc, f"training.guided_frames {NEEDS_CTC_HEAD}"),
        (config.decoding.ctc_weight == 0 or has_ctc, f"decoding.ctc_weight {NEEDS_CTC_HEAD}"),
        (config.augment.splice == 0 or has_ctc, f"augment.splice {NEEDS_CTC_HEAD}"),
        (len(model.speller.lstm_sizes) >= 1, "model.speller.lstm_sizes must have at least one cell"),
    ]


def _view_rules(decoding: DecodingConfig) -> list[Rule]:
    counts = len(decoding.speeds), len(decoding.warps)
    return [
        (min(counts) > 0, "decoding.speeds and decoding.warps need a value each; 1 means unchanged"),
        (
            counts[0] == counts[1] or 1 in counts,
            f"decoding.speeds has {counts[0]} values and decoding.warps {counts[1]}; give as many of both, or a single "
            "one of either",
        ),
    ]


def _feature_rules(config: Config) -> list[Rule]:
    features, augment = config.features, config.augment
    can_warp = features.kind == "logmel" or features.size <= features.mel_bins
    enough_bins = (
        f"features.mel_bins ({features.mel_bins}) of at least features.size ({features.size}); "
        "give the number of mel filters of the MFCC"
    )
    return [
        (features.deltas in (0, 1, 2), f"features.deltas must be 0, 1 or 2; got {features.deltas}"),
        (
            not 0 < features.lifter < 1,
            f"features.lifter must be 0 for none, or at least 1; got {features.lifter:g}",
        ),
        (not augment.warp or can_warp, f"augment.warp needs {enough_bins}"),
        (set(config.decoding.warps) <= {1.0} or can_warp, f"decoding.warps need {enough_bins}"),
        (
            augment.snr_low <= augment.snr_high,
            f"augment.snr_low must be at most augment.snr_high; got {augment.snr_low:g} and {augment.snr_high:g} dB",
        ),
    ]


def _training_rules(config: Config) -> list[Rule]:
    training, data, augment = config.training, config.data, config.augment
    return [
        (
            augment.splice == 0 or augment.splice_epoch < training.epochs,
            f"augment.splice_epoch must be below training.epochs ({training.epochs}); got {augment.splice_epoch}; "
            "lower it, or set augment.splice to 0",
        ),
        (
            not (data.dev and data.dev_share),
            "data.dev names a dev split and data.dev_share holds one out; set data.dev to '' or data.dev_share to 0",
        ),
        (not training.restarts or training.schedule == "cosine", "training.restarts needs training.schedule cosine"),
        (
            all(a < b for a, b in pairwise((*training.restarts, training.epochs))),
            f"training.restarts must increase and stay below training.epochs; got {[*training.restarts]} and "
            f"{training.epochs}; --training.restarts without a value means none",
        ),
        *(
            (
                s.start <= s.end,
                f"training.teacher_forcing: a stage must not end before it starts; got {s.start:g} to {s.end:g}",
            )
            for s in training.teacher_forcing
        ),
    ]


def check_training(config: Config) -> Config:
    """Return the settings of a training that is to run if they make sense, or raise InputError that names the field.

    Checkpoints of earlier versions may break these rules, which matter only in training.
    """
    training, augment = config.training, config.augment
    _require([
        (
            training.guided_frames == 0 or training.guided_weight == 0 or training.ctc_weight > 0,
            "training.guided_frames follows the CTC head, which training.ctc_weight 0 does not train; raise "
            "training.ctc_weight, or set training.guided_frames to 0",
        ),
        (
            augment.join == 0 or " " in config.data.characters,
            "augment.join joins transcripts by a space, which data.characters lacks; add it, or set augment.join to 0",
        ),
    ])  # fmt: skip
    return config


def check_decoding(config: Config, decoding: DecodingConfig) -> DecodingConfig:
    """Return search settings if they fit a checkpoint's config; else raise InputError that names the field."""
    return check(dataclasses.replace(config, decoding=decoding)).decoding


def _numbers(config: Any, name: str = "", bounds: Bounds = Bounds()) -> Iterator[tuple[str, int | float, Bounds]]:
    """Yield (dotted name, value, bounds) of each number; the items of a tuple share its name."""
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
    """The settings of a checkpoint that the command line of a decoding command may change."""

    decoding: DecodingConfig = field(default_factory=DecodingConfig)
