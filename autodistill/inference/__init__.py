"""A torch model scores, samples and answers, in batches and with quantised weights."""
