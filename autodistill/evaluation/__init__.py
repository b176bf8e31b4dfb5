"""What an evaluator is, what evaluators share, and the evaluation of one student."""
