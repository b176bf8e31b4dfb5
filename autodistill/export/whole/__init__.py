"""GGUF files of models that belong to no family, as transformers describes them: shared code, one file per graph."""
