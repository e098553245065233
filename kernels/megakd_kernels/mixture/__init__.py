"""Divergences from a mixture of both models: JSD, skewed KLs, total variation."""
