"""Runtimes and boards that serve a student: llama.cpp, transformers, vLLM, ssh, and their timing."""
