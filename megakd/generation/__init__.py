"""Responses from a model: static cache, prefill and decoding over TP and PP, sampling that is the same on every layout; files of them."""
