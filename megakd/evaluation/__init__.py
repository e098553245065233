"""What a model's answers are worth: scores, held-out losses, exposure bias."""
