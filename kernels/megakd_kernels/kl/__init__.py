"""Kullback-Leibler divergences, and the prompt loss, which is two of them."""
