"""GGUF files of models of no family, as transformers describes them: what all have in common, and a file a graph."""
