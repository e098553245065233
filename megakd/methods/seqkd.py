"""SeqKD (Kim & Rush 2016): the teacher's responses are the student's data. L = CE, or (1 − r)·CE + r·KL(p‖q) with --kd-ratio r.

A prompt's response is drawn once: its noise is a function of (seed, sample), not of the iteration, so that every epoch, layout and
resumed run learns the same text. `scripts/generate.py` writes such data to a file beforehand, for `--method sft`.
"""

from dataclasses import replace

from megakd.methods.kd import KD, USUAL_RATIO
from megakd.methods.rollout import rollout

ONCE = 0  # the iteration that the noise is drawn for


class SeqKD(KD):
    """KD on `written`, the answers so far of the teacher: kept in memory, alike on every rank, and not saved."""

    on_policy = True  # it is given prompts; the data's own responses are never read

    def __init__(self, inputs, config, *, total_iters):
        super().__init__(inputs, config, total_iters=total_iters)
        self.teacher.attach(Writer, config, self.ends)
        self.written = {}  # sample_id -> the teacher's answer, of all replicas

    def train(self, samples, iteration):
        with self.time("rollout"):
            self.write([sample for sample in samples if sample.sample_id not in self.written])
        self.rollouts = [self.written[sample.sample_id] for sample in samples]
        usual = USUAL_RATIO if self.config.training.reference_compat.seqkd_with_kd else 0.0
        return self.learn(self.rollouts, iteration, kd_ratio=self.config.distillation.ratio(usual))

    def write(self, samples):
        """Answers that nobody has written yet, shared by all replicas: the next epoch deals the prompts to other ones."""
        answers = self.teacher.write(samples)
        self.written |= {answer.sample_id: answer for answer in self.all_gather_samples(answers)}


class Writer:
    """The teacher's hand, where it lives."""

    def __init__(self, teacher, config, ends):
        self.teacher, self.config, self.ends = teacher, config, ends

    def write(self, samples):
        """The samples with its answers, each behind what the teacher reads."""
        answers = rollout(self.teacher, [sample.for_teacher for sample in samples], self.config, self.ends, ONCE)
        return [replace(sample, response=answer.response) for sample, answer in zip(samples, answers)]
