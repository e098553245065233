"""SFT: L = −Σ log q(y_t | x, y_<t) over the response and its EOS."""

from megakd.losses.distillation import sft_loss
from megakd.methods.base import Method
from megakd.schedules import supervised_labels


class SFT(Method):
    """Supervised fine-tuning: teachers, baselines, and the students that on-policy methods begin with."""

    def train(self, samples, iteration):
        def loss(hidden, batch, number):
            return sft_loss(self.through_student(hidden), supervised_labels(batch), self.vocabulary)

        return self.student_step(self.batches(samples), loss, ("loss/lm",), iteration)
