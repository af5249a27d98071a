"""Proofs that the Triton kernels are right and fast, made on a machine without a GPU."""
