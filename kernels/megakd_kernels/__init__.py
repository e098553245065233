"""Vocabulary-parallel distillation losses, from logits or straight from hidden states. Knows torch and Triton only."""
