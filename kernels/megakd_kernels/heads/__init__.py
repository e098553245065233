"""Losses of hidden states through their heads, in chunks: no tensor of the logits' size exists."""
