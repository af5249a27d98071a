"""A trained model in other runtimes: export to ONNX, and an example that runs it without PyTorch."""
