"""A torch model scores, samples and answers, in batches and on packed weights."""
