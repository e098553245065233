"""KD: L = (1 − r)·CE + r·KL(p‖q) on the data's responses (Hinton et al. 2015; word-level KD of the MiniLLM and PromptKD papers)."""

from megakd.losses.distillation import kd_loss
from megakd.methods.base import Method
from megakd.schedules import supervised_hidden, supervised_labels


class KD(Method):
    """The teacher reads first and leaves its hidden states on the last stage; the student learns from them."""

    def train(self, samples, iteration):
        batches = self.batches(samples)
        with self.time("teacher"):
            teacher = supervised_hidden(self.teacher, batches)

        def loss(hidden, batch, number):
            q, p = self.through_student(hidden), self.through_teacher(teacher[number])
            return kd_loss(q, p, supervised_labels(batch), self.vocabulary, kd_ratio=self.config.distillation.kd_ratio)

        return self.student_step(batches, loss, ("loss/total", "loss/lm", "loss/forward_kl"), iteration)
