"""The gains, costs and losses of distillation and quantisation."""
