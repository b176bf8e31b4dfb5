"""Exporters to graphs that run without transformers: ONNX, torch.export and TorchScript."""
