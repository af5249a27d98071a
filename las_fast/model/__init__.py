"""The network: listener, attention and speller, combined in the LAS model."""

from las_fast.model.las import LAS, Output

__all__ = ["LAS", "Output"]
