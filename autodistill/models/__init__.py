"""What a model is, by its config or its file: families, shapes, tensors, the GGUF reader, loading."""
