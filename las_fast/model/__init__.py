"""The network: listener, attention and speller, and the LAS model that they make up."""

from las_fast.model.las import LAS, Output

__all__ = ["LAS", "Output"]
