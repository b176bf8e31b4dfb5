"""What a model is, from its config or its file: families, shapes, tensors, the GGUF reader, loading."""
