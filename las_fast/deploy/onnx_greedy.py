"""Recognise speech with an exported model: numpy and onnxruntime, without PyTorch.

    python onnx_greedy.py mine.onnx talk.wav            16 bits, one channel, the sample rate of the model
    python onnx_greedy.py mine.onnx frames.npy          (T, F) float32 feature frames

mine.onnx is the --out of las_fast.export. This file imports nothing of las_fast: copy it into your program.
"""

import json
import os
import sys
import wave

import numpy as np
import onnxruntime


class Recogniser:
    """The listener and the speller of `las_fast.export --format onnx --out mine.onnx`."""

    def __init__(self, path):
        parts = [f"{path.removesuffix('.onnx')}.{part}.onnx" for part in ("listener", "speller")]
        self.listener, self.speller = (onnxruntime.InferenceSession(part) for part in parts)
        self.settings = json.loads(self.listener.get_modelmeta().custom_metadata_map["las_fast"])

    def listen(self, utterances):
        """Encode utterances, each an array (T, F) of feature frames; return the inputs of the speller."""
        counts = np.array([len(frames) for frames in utterances])
        batch = np.zeros((len(counts), counts.max(), utterances[0].shape[1]), np.float32)
        for row, frames in zip(batch, utterances, strict=True):
            row[: len(frames)] = frames
        names = ["keys", "values", "lengths"]
        return dict(zip(names, self.listener.run(names, {"frames": batch, "frame_counts": counts}), strict=True))

    def greedy(self, utterances):
        """Return the text of each utterance, with the most probable token at each step."""
        memory, settings, state = self.listen(utterances), self.settings, {}
        limits, rows = self.limits(memory["lengths"]), len(utterances)
        for one in self.speller.get_inputs()[4:]:
            state[one.name] = np.zeros((rows, 1, one.shape[2]), np.float32)
        last, ended, tokens = np.full((rows, 1), settings["sos"]), np.zeros(rows, bool), []
        for step in range(limits.max() + 1):
            logits, _, *new_state = self.speller.run(None, {"tokens": last, **memory, **state})
            state = dict(zip(state, new_state, strict=True))
            best = np.where(ended | (limits == step), settings["eos"], logits[:, 0].argmax(-1))
            ended |= best == settings["eos"]
            tokens.append(best)
            if ended.all():
                break
            last = best[:, None]
        return ["".join(settings["characters"][t - 3] for t in row if t >= 3) for row in np.stack(tokens, 1)]

    def limits(self, lengths):
        """Return the maximum number of tokens of each utterance."""
        frames = (lengths * self.settings["time_reduction"]).astype(np.float32)
        tokens = (frames * np.float32(self.settings["maximum_share"])).astype(np.int64)
        return np.maximum(tokens + self.settings["maximum_extra"], 1)


def features(samples, settings):
    """Return the log-mel or MFCC frames (T, F), as Kaldi defines them, of samples (N,) from -1 to 1.

    settings: "features" of the model's settings.
    """
    rate, bins = settings["sample_rate"], settings["size" if settings["kind"] == "logmel" else "mel_bins"]
    size, shift = (round(rate * settings[key] / 1000) for key in ("window_ms", "shift_ms"))
    samples = np.pad(samples, (0, max(0, size - len(samples)))).astype(np.float64) * 32768
    frames = np.lib.stride_tricks.sliding_window_view(samples, size)[::shift]
    frames = frames - frames.mean(1, keepdims=True)
    frames[:, 1:] -= 0.97 * frames[:, :-1]
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / (size - 1))) ** 0.85
    padded = 1 << (size - 1).bit_length()
    power = np.abs(np.fft.rfft(frames * window, padded)) ** 2

    def mel(hertz):
        return 1127 * np.log1p(np.asarray(hertz) / 700)

    edges, at = np.linspace(mel(20), mel(rate / 2), bins + 2), mel(np.arange(padded // 2 + 1) * rate / padded)[:, None]
    rising, falling = (at - edges[:-2]) / np.diff(edges)[:-1], (edges[2:] - at) / np.diff(edges)[1:]
    filters = np.maximum(np.minimum(rising, falling), 0)
    filters[-1] = 0
    logs = np.log(np.maximum(power @ filters, np.finfo(np.float32).eps))
    if settings["kind"] == "logmel":
        return logs.astype(np.float32)
    k = np.arange(settings["size"])
    dct = np.sqrt(2 / bins) * np.cos(np.pi / bins * (np.arange(bins)[:, None] + 0.5) * k)
    dct[:, 0] = np.sqrt(1 / bins)
    lifter = settings["lifter"]
    scales = 1 + lifter / 2 * np.sin(np.pi * k / lifter) if lifter else 1
    return (logs @ (dct * scales)).astype(np.float32)


def read_wav(path, rate):
    """Return the samples (N,) from -1 to 1 of a wav file; exit with an error if the model cannot use it."""
    try:
        with wave.open(path) as file:
            actual = (file.getframerate(), file.getnchannels(), file.getsampwidth() * 8)
            if actual == (rate, 1, 16):
                data = file.readframes(file.getnframes())
                samples = np.frombuffer(data[: len(data) // 2 * 2], "<i2") / 32768
                if len(samples) and len(samples) == file.getnframes():
                    return samples
                sys.exit(f"{path} has {len(samples)} of the {file.getnframes()} samples it announces; copy it again")
    except (OSError, EOFError, wave.Error) as error:
        sys.exit(f"{path} cannot be read as wav ({error}); convert it to {rate} Hz, one channel, 16 bits")
    sys.exit(f"{path} has (Hz, channels, bits) {actual}; the model needs {(rate, 1, 16)}; convert it")


def open_model(path):
    """Return the Recogniser of a model; exit with an error if its files are missing or are not such a model."""
    stem = path.removesuffix(".onnx")
    whole = stem.removesuffix(".listener").removesuffix(".speller")
    for part in (f"{stem}.listener.onnx", f"{stem}.speller.onnx"):
        if not os.path.isfile(part):
            sys.exit(
                f"{part} does not exist; write it by las_fast.export --format onnx --out {stem}.onnx"
                if stem == whole
                else f"{path} is one of the two files of a model; give {whole}.onnx, which stands for both"
            )
    try:
        return Recogniser(path)
    except Exception as error:  # those of onnxruntime have no common base class
        sys.exit(f"{path} is not a model that las_fast.export wrote ({type(error).__name__}: {error}); export it again")


def read_frames(path, settings):
    """Return the frames (T, F) of a wav file or of .npy features; exit with an error if the model cannot use it."""
    if path.lower().endswith(".wav"):
        return features(read_wav(path, settings["sample_rate"]), settings)
    if not path.lower().endswith(".npy"):
        sys.exit(f"{path}: give a wav file or .npy features")
    try:
        frames = np.load(path)
    except (OSError, EOFError, ValueError) as error:
        sys.exit(f"{path} cannot be read as .npy ({error}); give a wav file or .npy features")
    if frames.ndim != 2 or not len(frames) or frames.shape[1] != settings["size"] or frames.dtype.kind not in "fiu":
        sys.exit(f"{path} has shape {frames.shape} and type {frames.dtype}; the model needs (T, {settings['size']})")
    if not np.isfinite(frames).all():
        sys.exit(f"{path} contains NaN or infinite values; compute it again")
    return frames


if __name__ == "__main__":
    if {"-h", "--help"} & {*sys.argv}:
        print(__doc__)
        sys.exit()
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    model = open_model(sys.argv[1])
    for name in sys.argv[2:]:
        print(f"{name}: {model.greedy([read_frames(name, model.settings['features'])])[0]}")
