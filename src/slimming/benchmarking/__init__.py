"""Measure the speed of models in PyTorch, `torch.compile` and ONNX Runtime."""
