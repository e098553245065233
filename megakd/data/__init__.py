"""Text to tokens to Batch: the hallway every method walks through. No megatron here: parallel layouts arrive as numbers."""
