"""las_fast: Listen, Attend and Spell speech recognition.

    import las_fast

    model = las_fast.load("english")
    print(model.transcribe("talk.mp3").text)

The import is fast: torch is imported when a name that needs it is first used.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # True for type checkers; importing typing would take most of the import's time
if TYPE_CHECKING:
    from typing import Any

    from las_fast import ops
    from las_fast.errors import InputError
    from las_fast.model.las import LAS
    from las_fast.output.transcripts import Hypothesis, Segment, Transcript, Word
    from las_fast.recogniser import Recogniser, load

__version__ = "0.5.0.dev0"
__all__ = [
    "LAS",
    "Hypothesis",
    "InputError",
    "Recogniser",
    "Segment",
    "Transcript",
    "Word",
    "__version__",
    "load",
    "ops",
]

_MODULES = {
    "LAS": "model",
    "Hypothesis": "output.transcripts",
    "InputError": "errors",
    "Recogniser": "recogniser",
    "Segment": "output.transcripts",
    "Transcript": "output.transcripts",
    "Word": "output.transcripts",
    "load": "recogniser",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'las_fast' has no attribute {name!r}")
    if name == "ops":
        return import_module("las_fast.ops")
    value = getattr(import_module(f"las_fast.{_MODULES[name]}"), name)
    globals()[name] = value  # later uses do not call __getattr__
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
