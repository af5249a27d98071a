"""HW4P2 archives from before 2022: train.npy, train_transcripts.npy and so on, each an array of Python objects.

They are refused, because np.load would run any code in such a file. The error explains how to convert trusted files.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from las_fast.data.folders import list_files, subfolders
from las_fast.data.npy import LOAD_ERRORS
from las_fast.errors import InputError

CONVERT = (
    "import numpy as np, os; [(os.makedirs(d, exist_ok=True), [np.save(f'{d}/{i:05}', np.array(list(x)) "
    "if getattr(x, 'dtype', 0) == object else x) for i, x in enumerate(np.load(f, allow_pickle=True, "
    "encoding='bytes'))]) for s in ('train', 'dev', 'test') for d, f in ((f'new/{s}/mfcc', f'{s}.npy'), "
    "(f'new/{s}/transcripts', f'{s}_transcripts.npy')) if os.path.exists(f)]"
)


def advice(root: Path) -> str:
    """Return the error for a folder with arrays of Python objects, directly or one folder below; "" without any."""
    for folder in (root, *subfolders(root)):
        names = [path.name for path in _arrays(folder) if _has_objects(path)]
        if names:
            return (
                f"{folder} has {', '.join(names[:6])}, arrays of Python objects as in HW4P2 before 2022, which are "
                "refused because loading them can run code; if you trust them, convert them to a folder 'new' there "
                f'with: python -c "{CONVERT}", and give that folder'
            )
    return ""


def _arrays(folder: Path) -> list[Path]:
    try:
        return list_files(folder, {".npy"})[:20]
    except InputError:
        return []


def _has_objects(path: Path) -> bool:
    """Return whether a .npy contains Python objects, according to its header."""
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            return read(file)[2].hasobject
    except LOAD_ERRORS:
        return False
