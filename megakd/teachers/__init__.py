"""Whoever a learner may learn from, asked in one way: `rows = teacher.read(batches, to=layout)`."""
