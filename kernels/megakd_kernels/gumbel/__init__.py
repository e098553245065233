"""Draws from a softmax by Gumbel-max, in one reading of the logits."""
