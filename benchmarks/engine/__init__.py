"""What distillation and quantisation gain, cost and lose."""
