"""Decoders of PTX instructions, by what they work on; importing this package registers all of them.

Values in registers: moves, arithmetic, bits, comparisons. Memory: accesses, copies, matrices. Threads together: warps.
"""

from gpu_proof.instructions import accesses, arithmetic, bits, comparisons, copies, matrices, moves, warps
from gpu_proof.instructions.decoding import decoder_of

__all__ = ["accesses", "arithmetic", "bits", "comparisons", "copies", "decoder_of", "matrices", "moves", "warps"]
