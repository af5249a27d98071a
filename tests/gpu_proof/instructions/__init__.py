"""Decoders of PTX instructions. Importing this package registers all of them.

Registers: moves, arithmetic, bits, comparisons. Memory: accesses, copies, matrices. Communication of threads: warps.
"""

from gpu_proof.instructions import accesses, arithmetic, bits, comparisons, copies, matrices, moves, warps
from gpu_proof.instructions.decoding import decoder_of

__all__ = ["accesses", "arithmetic", "bits", "comparisons", "copies", "decoder_of", "matrices", "moves", "warps"]
