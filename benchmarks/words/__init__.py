"""Measure word times and confidences, and fit the confidences of a checkpoint: python -m benchmarks.words --help."""
