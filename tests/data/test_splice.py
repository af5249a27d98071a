"""Words of other utterances in training: the frames and the text change together, and nothing else does."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch

from las_fast.config import FeatureConfig
from las_fast.data.splice import MAX_STRETCH, MIN_LOG_PROB, SECONDS, WORD_SHARE, Splice, WordTable
from las_fast.errors import InputError

PAUSE = 3  # frames before each word and after the last
LENGTHS = (10, 11, 12, 30, 31, 33)  # frames of the words


class Data:
    """Utterances whose words are constant frames: the second value of a frame is a number that only its word has."""

    features = FeatureConfig()  # 10 ms per frame

    def __init__(self, utterances=12, words=4):
        generator = np.random.default_rng(0)
        self.texts, self._raw, rows, self.values = [], [], [], {}
        for i in range(utterances):
            text, frames, spans = "", [torch.full((PAUSE, 2), 10.0 * i)], []
            for k in range(words):
                word, length = f"W{i}X{k}", int(generator.choice(LENGTHS))
                self.values[word] = 100.0 * (1 + i * words + k)
                start = sum(map(len, frames))
                spans.append((len(text), len(text) + len(word), start, start + length))
                text += f"{word} " + " " * (k == 1)  # two spaces in one place
                frames += [torch.tensor([[10.0 * i, self.values[word]]]).repeat(length, 1)]
                frames += [torch.full((PAUSE, 2), 10.0 * i)]
            self.texts.append(text.rstrip())
            self._raw.append(torch.cat(frames))
            rows += [(i, *span) for span in spans]
        columns = np.array(rows, np.int32)
        self.table = WordTable(columns[:, 0], columns[:, 1:3], columns[:, 3:], np.zeros(len(rows), np.float32))

    def __len__(self):
        return len(self.texts)

    def raw(self, i):
        return self._raw[i]


@pytest.fixture
def data():
    return Data()


def call(splice, i, seed):
    return splice(i, splice.dataset.raw(i), np.random.default_rng(seed))


def rows_of(data, i):
    return np.flatnonzero(data.table.utterances == i)


def test_the_words_of_the_text_are_those_that_are_heard(data):
    splice, replaced = Splice(data, data.table), 0
    for i in range(len(data)):
        before = data.raw(i).clone()
        frames, text = call(splice, i, i)
        assert torch.equal(data.raw(i), before) and frames.shape == before.shape
        words, old = text.split(), data.texts[i].split()
        assert len(words) == len(old) and text.replace(" ", "") == "".join(words)
        mean, untouched = before.mean(0), torch.ones(len(frames), dtype=bool)
        for row, word, was in zip(rows_of(data, i), words, old, strict=True):
            start, end = data.table.frames[row]
            untouched[start:end] = False
            donor = next(j for j, text in enumerate(data.texts) if word in text.split())
            expected = data.values[word] - data.raw(donor).mean(0)[1] + mean[1]
            torch.testing.assert_close(frames[start:end, 1], torch.full((int(end - start),), float(expected)))
            replaced += word != was
        assert torch.equal(frames[untouched], before[untouched])
    assert replaced > 5


def test_spaces_of_the_text_stay(data):
    _, text = call(Splice(data, data.table), 0, 1)
    assert text != data.texts[0] and text.count("  ") == data.texts[0].count("  ") == 1


def test_the_same_state_of_the_generator_gives_the_same_utterance(data):
    first, again = (call(Splice(data, data.table), 3, 5) for _ in range(2))
    assert torch.equal(first[0], again[0]) and first[1] == again[1]
    assert len({call(Splice(data, data.table), 3, seed)[1] for seed in range(9)}) > 4


def test_a_quarter_of_the_words_is_replaced():
    data = Data(utterances=200, words=10)
    splice = Splice(data, data.table)
    texts = [call(splice, i, i)[1] for i in range(200)]
    changed = [
        new != old for i, text in enumerate(texts) for new, old in zip(text.split(), data.texts[i].split(), strict=True)
    ]
    assert abs(np.mean(changed) - WORD_SHARE) < 0.03


def test_replacements_are_of_nearly_the_same_length():
    data = Data(utterances=60)
    length = dict(zip(" ".join(data.texts).split(), np.diff(data.table.frames)[:, 0].tolist(), strict=True))
    splice, used = Splice(data, data.table), set()
    for i in range(60):
        for new, old in zip(call(splice, i, i)[1].split(), data.texts[i].split(), strict=True):
            assert abs(length[new] - length[old]) <= MAX_STRETCH * length[old]
            used.add((length[old], length[new]))
    assert {(10, 12), (12, 10), (30, 33)} <= used  # stretched in both directions


def test_a_stretched_word_is_interpolated(data):
    splice = Splice(data, data.table)
    row = int(np.argmax(np.diff(data.table.frames)[:, 0] == 10))
    start, end = data.table.frames[row]
    data._raw[data.table.utterances[row]][start:end, 1] = torch.arange(10.0)
    stretched = splice._stretched(row, 12)
    assert stretched.shape == (12, 2) and (stretched[1:, 1] >= stretched[:-1, 1]).all()
    spread = stretched[-1, 1] - stretched[0, 1]
    assert 8.5 < spread <= 9


def shares(texts, prefix):
    words = " ".join(texts).split()
    return sum(word.startswith(prefix) for word in words) / len(words)


def test_words_with_unsure_frames_stay_and_replace_none():
    data = Data(utterances=2, words=60)
    second = data.table.utterances == 1
    table = replace(data.table, log_probs=np.where(second, MIN_LOG_PROB - 0.1, 0).astype(np.float32))
    splice = Splice(data, table)
    assert splice.candidates == 60
    assert call(splice, 1, 0)[1] == data.texts[1]
    texts = [call(splice, 0, seed)[1] for seed in range(5)]
    assert data.texts[0] not in texts and shares(texts, "W1") == 0


@pytest.mark.parametrize("frames", [round(100 * SECONDS[0]) - 1, round(100 * SECONDS[1]) + 1])
def test_very_short_and_long_words_replace_none(frames):
    data = Data(utterances=3, words=20)
    spans = data.table.frames.copy()
    third = data.table.utterances == 2
    spans[third, 1] = spans[third, 0] + frames
    splice = Splice(data, replace(data.table, frames=spans))
    assert splice.candidates == 40
    texts = [call(splice, 0, seed)[1] for seed in range(5)]
    assert shares(texts, "W2") == 0 and 0 < shares(texts, "W1") < 0.3


def test_an_utterance_without_text_keeps_none(data):
    data.texts[2] = None
    assert all(call(Splice(data, data.table), 2, seed)[1] is None for seed in range(4))


def test_without_words_or_candidates_nothing_changes(data):
    none = WordTable(*(column[:0] for column in vars(data.table).values()))
    uncertain = replace(data.table, log_probs=np.full(len(data.table.utterances), -9.0, np.float32))
    for table in (none, uncertain):
        splice = Splice(data, table)
        frames, text = call(splice, 2, 0)
        assert torch.equal(frames, data.raw(2)) and text == data.texts[2] and splice.candidates == 0


def test_an_utterance_without_words_in_the_table_stays(data):
    kept = data.table.utterances != 4
    table = WordTable(*(column[kept] for column in vars(data.table).values()))
    splice = Splice(data, table)
    assert all(call(splice, 4, seed)[1] == data.texts[4] for seed in range(5))
    assert any(call(splice, 5, seed)[1] != data.texts[5] for seed in range(5))
    assert not any("W4X" in call(splice, i, seed)[1] for i in (3, 5) for seed in range(20))


def test_a_table_is_read_as_it_was_written(data, tmp_path):
    data.table.save(tmp_path / "words.npz", "mine")
    read = WordTable.load(tmp_path / "words.npz", "mine")
    for ours, theirs in zip(vars(read).values(), vars(data.table).values(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype
    assert [path.name for path in tmp_path.iterdir()] == ["words.npz"]
    with pytest.raises(InputError, match="words.npz is of another training set; delete it"):
        WordTable.load(tmp_path / "words.npz", "other")


def npy():
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


DAMAGED = {
    "empty": b"",
    "cut": b"PK\x03\x04 cut",
    "text": b"something else",
    "npy": npy(),
    "pickle": npz(data=np.array([{}], dtype=object)),
    "no columns": npz(data="mine"),
    "no data": npz(utterances=np.zeros(3)),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_table_is_a_one_sentence_error(tmp_path, name):
    path = tmp_path / "words.npz"
    path.write_bytes(DAMAGED[name])
    with pytest.raises(InputError, match=r"words.npz is damaged; delete it, and the words will be aligned again"):
        WordTable.load(path, "mine")
