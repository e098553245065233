"""DistiLLM's adaptive off-policy data (Ko et al. 2024, arXiv 2402.03898), with KD's loss: usually a skewed KL and --kd-ratio 1.

φ is the share of batches that are the student's own text. It begins at 0 and rises by 0.1 whenever the held-out loss has risen by 0.1,
that is when the data alone no longer help. Of these batches the student writes a share 1 − g/G anew, late in the run fewer and fewer;
the others are drawn from what it wrote before:

    u < φ (1 − g/G), or u < φ while the buffer is not full     the student writes, and the buffer keeps it
    u < φ                                                      a draw from the buffer
    otherwise                                                  the data
"""

import random
from dataclasses import replace

import torch

from megakd.data.batch import Sample
from megakd.data.dataloader import split_across_dp
from megakd.methods.kd import KD
from megakd.methods.rollout import rollout

STEP, TOLERANCE = 0.1, 0.1  # how far φ rises, and after which rise of the held-out loss
WATCHED = "valid/lm_loss"


class DistiLLM(KD):
    """KD that decides at every iteration whose text is learnt: new, remembered, or the data's."""

    def __init__(self, inputs, config, *, total_iters):
        super().__init__(inputs, config, total_iters=total_iters)
        self.buffer = ReplayBuffer(config.distillm.replay_capacity, config.data.max_length)
        self.threshold, self.last_loss = torch.tensor(0.0), torch.tensor(torch.inf)
        self.dataset = ()

    @classmethod
    def answers_prompts(cls, config):
        return True

    def train_iteration(self, loader, iteration):
        self.dataset = loader.dataset
        return super().train_iteration(loader, iteration)

    def train(self, samples, iteration):
        rng = random.Random(f"{self.config.training.seed}/{iteration}")
        u, threshold = rng.random(), self.threshold.item()
        if u < threshold * (1 - iteration / self.total_iters) or (u < threshold and not self.buffer.is_full):
            with self.time("rollout"):
                samples = self.rollouts = rollout(self.student, samples, self.config, self.ends, iteration)
            self.buffer.add(self.all_gather_samples(samples))
        elif u < threshold:
            drawn = [self.as_taught(sample) for sample in self.buffer.draw(self.config.training.global_batch_size, rng)]
            samples = split_across_dp(drawn, self.layout.dp_size)[self.layout.dp_rank]
        learnt = self.learn(samples, iteration, kd_ratio=self.config.distillation.ratio(1.0))
        return learnt | {"on_policy_share": threshold}

    def as_taught(self, sample):
        """A remembered response with its teacher and what that reads before it, which the data know."""
        known = self.dataset[sample.sample_id]
        return replace(sample, teacher_prompt=known.teacher_prompt, teacher=known.teacher)

    def on_evaluation(self, metrics):
        """φ rises when the held-out loss has; the first one seen is what later ones are compared with."""
        first, loss = self.last_loss.isinf().item(), metrics[WATCHED]
        if first or loss >= self.last_loss.item() + TOLERANCE:
            self.threshold.add_(0.0 if first else STEP).clamp_(max=1.0)
            self.last_loss.fill_(loss)

    def extra_tensors(self):
        return {"threshold": self.threshold, "last_loss": self.last_loss, **self.buffer.tensors}


class ReplayBuffer:
    """The last `capacity` responses, as tensors of fixed shape that a checkpoint keeps; the same on every rank."""

    def __init__(self, capacity: int, max_length: int):
        self.ids = torch.zeros(capacity, max_length, dtype=torch.int64)
        self.sizes = torch.zeros(capacity, 3, dtype=torch.int64)  # ids of the prompt, of the response, and the sample's id
        self.written = torch.tensor(0)  # ever

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """By name, for a checkpoint, which fills them in place when it is loaded."""
        return {"buffer_ids": self.ids, "buffer_sizes": self.sizes, "buffer_written": self.written}

    @property
    def is_full(self) -> bool:
        """Whether the next response pushes out the oldest."""
        return int(self.written) >= len(self.ids)

    def add(self, samples: list[Sample]) -> None:
        """The oldest make room. Samples are put in the order of their ids: which replica wrote one changes nothing."""
        for sample in sorted(samples, key=lambda sample: sample.sample_id):
            place = int(self.written) % len(self.ids)
            text = torch.tensor(sample.prompt + sample.response)
            self.ids[place, : len(text)] = text
            self.sizes[place] = torch.tensor([len(sample.prompt), len(sample.response), sample.sample_id])
            self.written += 1

    def draw(self, count: int, rng: random.Random) -> list[Sample]:
        """`count` of them, with replacement."""
        return [self[rng.randrange(min(int(self.written), len(self.ids)))] for _ in range(count)]

    def __getitem__(self, place: int) -> Sample:
        prompt, response, sample_id = self.sizes[place].tolist()
        ids = self.ids[place, : prompt + response].tolist()
        return Sample(sample_id, tuple(ids[:prompt]), tuple(ids[prompt:]))
