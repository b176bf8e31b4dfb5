"""Times of the blocks of a model, measured in llama.cpp on this machine."""
