"""Copies of a run's trials in an experiment tracker (MLflow, TensorBoard, Weights & Biases), later or while it runs."""
