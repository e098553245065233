"""What a model's answers are worth: scores, held-out losses, exposure bias; and answers written to a file for training."""
