"""Trials of a run in an experiment tracker: MLflow, TensorBoard, Weights & Biases; from its log, or while it runs."""
