"""Response priming (Goyal et al. 2024): a teacher that is told how to answer, and a student that is not.

    L = α · (−log q(y_t | x, y_<t))  +  (1 − α) · T² · KL(q_T‖p_T)            q_T = softmax(z / T), p_T the primed teacher's

on the data's responses y, of the predictions of the same token: `aligned`. The paper's code compares something else, `original`: the
student reads the question x alone, the teacher its primed question x', the labels are the answer's tokens, and all three are cut to the
shortest and compared place by place, so that neither model's logits at place i predict label i. Its gradient is that, too.
"""

from functools import partial

from megakd.data.batch import collate, collate_unshifted
from megakd.losses.distillation import priming_loss
from megakd.methods.base import Method


class ResponsePriming(Method):
    """The teacher reads first; the student learns from the data and from what it says."""

    def __init__(self, inputs, config, *, total_iters):
        super().__init__(inputs, config, total_iters=total_iters)
        settings = config.response_priming
        self.collate = collate_unshifted if self.is_unshifted(config) else collate
        self.loss = partial(priming_loss, alpha=settings.priming_alpha, temperature=settings.priming_temperature)

    @classmethod
    def is_unshifted(cls, config):
        return config.response_priming.priming_objective == "original"

    @classmethod
    def needs_prompts(cls, config):
        return cls.is_unshifted(config)

    def train(self, samples, iteration):
        batches = self.batches(samples, self.collate)
        loss = lambda q, batch, p: self.loss(q, p, batch.supervised_labels, self.vocabulary)
        return self.student_step(batches, loss, iteration, context=self.read_teacher(batches))
