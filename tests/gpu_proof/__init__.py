"""Checks of the correctness and cost of the Triton kernels on a machine without a GPU."""
