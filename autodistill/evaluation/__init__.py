"""The interface of evaluators, what they share, and the evaluation of one student."""
