"""Which settings may differ when a training is resumed."""

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_checkpoints import small

from las_fast.config import Config
from las_fast.errors import InputError
from las_fast.training.resume import FREE_TO_CHANGE, check_same_settings
from las_fast.tree import to_tree


def settings(**training):
    return to_tree(small(training=replace(small().training, **training)))


@pytest.mark.parametrize(
    ("then", "now", "refused"),
    [
        ({"epochs": 2}, {"epochs": 3, "restarts": (2,)}, ""),
        ({"epochs": 2}, {"epochs": 5, "restarts": (2, 3)}, ""),
        ({"epochs": 3, "restarts": (2,)}, {"epochs": 5, "restarts": (2, 3)}, ""),
        ({"epochs": 2}, {"epochs": 3}, "epochs = 2, not 3; .*, or lengthen it: --training.epochs N "
         "--training.restarts 2$"),
        ({"epochs": 4, "restarts": (2,)}, {"epochs": 4, "restarts": (3,)}, r"restarts = \[2\], not \[3\]; .* "
         "--training.epochs N --training.restarts 2 4$"),
        ({"epochs": 3, "restarts": (2,)}, {"epochs": 4, "restarts": (1, 3)}, "lengthen it: .* 2 3$"),
        ({"epochs": 3, "restarts": (2,)}, {"epochs": 2}, "epochs = 3, not 2"),
        ({"epochs": 2, "schedule": "constant"}, {"epochs": 3, "schedule": "constant"},
         "epochs = 2, not 3; resume with the same settings$"),
        ({"seed": 1}, {"seed": 2}, "training.seed = 1, not 2; resume with the same settings$"),
    ],
)  # fmt: skip
def test_a_training_may_be_lengthened_by_a_restart_where_it_ended(then, now, refused):
    with pytest.raises(InputError, match=refused) if refused else contextlib.nullcontext():
        check_same_settings(settings(**then), settings(**now), Path("last.pt"))


def test_only_batch_sizes_may_become_smaller():
    then, smaller = to_tree(Config()), set()
    for section, part in then.items():
        for name, value in part.items():
            if not isinstance(value, bool) and isinstance(value, (int, float)) and value > 0:
                now = {**then, section: {**part, name: value / 2 if isinstance(value, float) else value - 1}}
                with contextlib.suppress(InputError):
                    check_same_settings(then, now, Path("last.pt"))
                    smaller.add(f"{section}.{name}")
    assert smaller - set(FREE_TO_CHANGE) == {"data.frames_per_batch", "data.utterances_per_batch"}
