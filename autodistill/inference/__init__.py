"""Scores, samples and answers with a torch model, in batches and with quantised weights."""
