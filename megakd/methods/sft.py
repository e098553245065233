"""SFT: L = −Σ log q(y_t | x, y_<t) over the response and its EOS."""

from megakd.methods.base import Method


class SFT(Method):
    """Supervised fine-tuning: teachers, baselines, and the students that on-policy methods begin with."""

    def train(self, samples, iteration):
        return self.cross_entropy_step(samples, iteration)
