"""Next tokens by Gumbel-max, with noise that knows nothing of the layout.

    token = argmax_v  z_v / T + g_v,    g_v = -log E_v,    E_v = -log(1 - u_v),    u_v = hash(seed, sample id and answer, position, v)

u_v is uniform in (0, 1), so g_v is a Gumbel variable and the token is a draw from softmax(z / T). The hash is a function of four
integers and nothing else: a sample gets the same tokens at any TP × PP × DP, in any batch and in any company. A tensor-parallel
rank makes the noise of its own columns, and ranks exchange one (score, token) pair a row; logits are gathered only where a whole
row must be seen: top-k, top-p, repetition limits.

B rows, V vocabulary, Vp columns on this rank (padded), K tokens seen by a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megakd_kernels import VocabShard, launch
from torch import Tensor

from megakd.errors import UserError

NO_TOKEN = -1  # where logits are NaN or infinite; it travels as a token does, for to look at it at once would wait for the GPU


@dataclass(frozen=True)
class Sampling:
    """How next tokens are chosen. The two repetition limits are off; the names are those of transformers.

    Raises:
        UserError: a setting is out of its range; the message names it.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    greedy: bool = False
    seed: int = 1234
    no_repeat_ngram_size: int = 0  # 0: off
    repetition_penalty: float = 1.0  # 1: off

    def __post_init__(self):
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "1 or more"),
            "temperature": (self.temperature > 0, "above 0; for the most likely token set greedy"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "no_repeat_ngram_size": (self.no_repeat_ngram_size >= 0, "0 (off) or more"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0; 1 is off"),
        }
        for name, (holds, rule) in checks.items():
            if not holds:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: it must be {rule}")

    @property
    def limits_repetition(self) -> bool:
        """Whether the tokens so far matter beside the logits."""
        return self.no_repeat_ngram_size > 0 or self.repetition_penalty != 1

    @property
    def cuts_the_tail(self) -> bool:
        """Whether top-k or top-p is on; a greedy choice does not need them."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1)

    @property
    def needs_whole_rows(self) -> bool:
        """Whether logits have to be gathered where tensor parallelism splits them."""
        return self.limits_repetition or self.cuts_the_tail


class Sampler:
    """Chooses the next tokens of a group of rows from the logits of one model, or of several that are mixed.

    `shares` are the weights of the mixture Σ share · softmax(z / T), one a model, with sum 1.
    """

    def __init__(self, sampling: Sampling, shard: VocabShard, shares: list[float], columns: int, device: torch.device):
        self.sampling, self.shard, self.shares = sampling, shard, shares
        self.whole = VocabShard(shard.valid_vocab) if sampling.needs_whole_rows else shard
        columns = shard.valid_vocab if sampling.needs_whole_rows else columns
        first = self.whole.start(columns)
        self.tokens = torch.arange(first, first + columns, dtype=torch.int32, device=device)

    def __call__(self, logits: list[Tensor], streams_B: Tensor, positions_B: Tensor, seen_BK: Tensor | None) -> Tensor:
        """Token ids [B].

        Args:
            logits: [B, Vp] of each model.
            streams_B: each row's stream of noise, from `noise_streams`.
            positions_B: number of tokens already sampled, int64: the place in each stream; or a scalar.
            seen_BK: prompt and response so far, -1 where a row is shorter; needed by repetition limits only.
        """
        if self.draws_at_once(logits):
            return self.draw(logits[0], streams_B, positions_B.expand_as(streams_B).contiguous())
        z = self.mix([self.prepare(x, seen_BK) for x in logits])
        if self.sampling.greedy:
            return argmax(z, self.whole)
        if self.sampling.top_k:
            z = keep_top_k(z, self.sampling.top_k)
        if self.sampling.top_p < 1:
            z = keep_top_p(z, self.sampling.top_p)
        token = argmax(gumbel(streams_B, positions_B, self.tokens).add_(z), self.whole)
        if self.sampling.top_p < 1 and self.shard.ranks > 1:  # each rank has its own softmax of the row
            dist.broadcast(token, group=self.shard.tp_group, group_src=0)
        return token

    def draws_at_once(self, logits: list[Tensor]) -> bool:
        """Whether a kernel draws, in two launches for some forty: from one model, of whose logits no whole row has to be seen."""
        simple = len(logits) == 1 and not (self.sampling.greedy or self.sampling.needs_whole_rows)
        return simple and launch.implementation(logits[0], "gumbel") == "triton"

    def draw(self, logits_BVp: Tensor, streams_B: Tensor, positions_B: Tensor) -> Tensor:
        """Token ids [B], by that kernel."""
        width, shard = logits_BVp.shape[1], self.shard
        where = {"columns": shard.columns(width), "first_token": shard.start(width), "no_token": NO_TOKEN}
        kernels = launch.kernels(logits_BVp, "gumbel")
        return of_all_ranks(*kernels.draw(logits_BVp, streams_B, positions_B, self.sampling.temperature, **where), shard)

    def prepare(self, logits_BVp: Tensor, seen_BK: Tensor | None) -> Tensor:
        """One model's logits in float32: padding out, repetition limited, divided by the temperature."""
        z = pad_(logits_BVp.float(), self.shard)
        if self.sampling.needs_whole_rows:
            z = gather_rows(z, self.shard)
        if self.sampling.repetition_penalty != 1:
            z = penalize(z, seen_BK, self.sampling.repetition_penalty)
        if self.sampling.no_repeat_ngram_size:
            z = z.masked_fill(ngram_ends(seen_BK, self.sampling.no_repeat_ngram_size, z.shape[1]), -math.inf)
        return z if self.sampling.temperature == 1 else z / self.sampling.temperature

    def mix(self, logits: list[Tensor]) -> Tensor:
        """log Σ share · softmax(z); a single model's logits as they are."""
        if len(logits) == 1:
            return logits[0]
        parts = [log_softmax(z, self.whole).add_(math.log(share)) for z, share in zip(logits, self.shares)]
        return torch.stack(parts).logsumexp(0)


# A whole row of logits, of which each rank has Vp columns.


def pad_(logits_BVp: Tensor, shard: VocabShard) -> Tensor:
    """Padded columns at -inf, in place."""
    logits_BVp[:, shard.columns(logits_BVp.shape[1]) :] = -math.inf
    return logits_BVp


def gather_rows(logits_BVp: Tensor, shard: VocabShard) -> Tensor:
    """Whole rows, [B, V], on every rank."""
    return torch.cat(list(shard.all_gather(logits_BVp[None])), 1)[:, : shard.valid_vocab]


def log_softmax(logits_BVp: Tensor, shard: VocabShard) -> Tensor:
    """log_softmax over whole rows, of this rank's columns."""
    if shard.ranks == 1:
        return logits_BVp.log_softmax(-1)
    total = shard.all_gather(logits_BVp.logsumexp(-1)[None]).logsumexp(0)  # [B]
    return logits_BVp - total[:, None]


def argmax(scores_BVp: Tensor, shard: VocabShard) -> Tensor:
    """Token ids [B] of the highest scores of whole rows, the lowest id among equals; NO_TOKEN where the highest is none."""
    score, column = scores_BVp.max(-1)  # NaN counts as the highest
    return of_all_ranks(score, (column + shard.start(scores_BVp.shape[1])).masked_fill(~(score < math.inf), NO_TOKEN), shard)


def of_all_ranks(score_B: Tensor, token_B: Tensor, shard: VocabShard) -> Tensor:
    """Token ids [B] of the highest of all ranks' scores, the lowest rank's among equals."""
    if shard.ranks == 1:
        return token_B
    pairs = shard.all_gather(torch.stack([score_B.double(), token_B.double()])[None])  # [tp, 2, B], exact in float64
    winner = pairs[:, 0].argmax(0)
    return pairs[:, 1].gather(0, winner[None])[0].long()


def keep_top_k(logits_BV: Tensor, k: int) -> Tensor:
    """All but the k highest of a row at -inf; equals of the k-th stay."""
    kth = logits_BV.topk(min(k, logits_BV.shape[1])).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < kth, -math.inf)


UNITS = 2**52  # of probability: a float32's, cut below that


def keep_top_p(logits_BV: Tensor, p: float) -> Tensor:
    """The shortest head of the sorted row whose probability reaches p; the rest at -inf."""
    ordered = logits_BV.sort(-1, descending=True).values
    share = (ordered.softmax(-1) * UNITS).long()  # whole numbers: their sum is the same in any order, which a GPU does not promise
    before = share.cumsum(-1) - share
    last = ordered.masked_fill(before >= max(1, round(p * UNITS)), math.inf).amin(-1, keepdim=True)
    return logits_BV.masked_fill(logits_BV < last, -math.inf)


def penalize(logits_BV: Tensor, seen_BK: Tensor, penalty: float) -> Tensor:
    """Tokens that a row has seen become less likely: positive logits are divided by the penalty, negative ones multiplied."""
    lowered = torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return torch.where(marked(seen_BK, logits_BV.shape[1]), lowered, logits_BV)


def ngram_ends(seen_BK: Tensor, n: int, vocabulary_size: int) -> Tensor:
    """[B, V]: tokens that would complete an n-gram which the row already holds."""
    if seen_BK.shape[1] < n:
        return marked(seen_BK[:, :0], vocabulary_size)
    grams = seen_BK.unfold(1, n, 1)  # [B, K - n + 1, n]
    tail = seen_BK[:, seen_BK.shape[1] - n + 1 :]
    repeats = (grams[..., :-1] == tail[:, None]).all(-1)
    return marked(grams[..., -1].masked_fill(~repeats, -1), vocabulary_size)


def marked(tokens_BK: Tensor, vocabulary_size: int) -> Tensor:
    """[B, V]: True at the tokens of each row; -1 marks nothing."""
    marks = torch.zeros(tokens_BK.shape[0], vocabulary_size + 1, dtype=torch.bool, device=tokens_BK.device)
    marks.scatter_(1, tokens_BK.masked_fill(tokens_BK < 0, vocabulary_size), True)
    return marks[:, :vocabulary_size]


# Noise. Rows and positions are told apart by a 64-bit mixer (splitmix64); within a row, the two halves of that key steer a 31-bit
# mixer over the token ids, in int32 because it runs over the whole vocabulary. 31 bits: torch's >> on int32 copies the sign.

MASK31 = 0x7FFFFFFF
GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - 2**64


GENERATION_STRIDE = 1 << 40  # no sample has such an id: answer 1 of one draws what answer 0 of no other does


def noise_streams(seed: int, sample_ids: Sequence[int], device: torch.device, generations: Sequence[int] = ()) -> Tensor:
    """One int64 an answer of a sample, by default the first: where its noise begins."""
    numbers = [i + g * GENERATION_STRIDE for i, g in zip(sample_ids, generations or [0] * len(sample_ids), strict=True)]
    ids_B = torch.tensor(numbers, dtype=torch.int64).to(device, non_blocking=True)
    return mix64(mix64(torch.full_like(ids_B, seed)) + ids_B * GOLDEN_GAMMA)


def gumbel(streams_B: Tensor, positions_B: Tensor, tokens_V: Tensor) -> Tensor:
    """Gumbel noise [B, V], float32, of token ids [V] (int32) at a position of each row's stream, or at one of all; 22.2 at most."""
    u = uniform31(mix64(streams_B + (positions_B + 1) * GOLDEN_GAMMA), tokens_V)
    exponential = u.mul_(-(2.0**-31)).sub_(2.0**-32).log1p_().neg_()  # small u resolve best, and they win
    return exponential.log_().neg_()


def uniform31(keys_B: Tensor, tokens_V: Tensor) -> Tensor:
    """Integers uniform in [0, 2^31), as float32 [B, V]."""
    low, high = ((keys_B >> shift & MASK31).int()[:, None] for shift in (0, 31))
    x = torch.bitwise_xor(tokens_V, low)
    spare = torch.empty_like(x)
    x = fold_(x, 16, spare).mul_(0x21F0AAAD).bitwise_and_(MASK31).bitwise_xor_(high)
    x = fold_(x, 15, spare).mul_(0x735A2D97).bitwise_and_(MASK31)
    return fold_(x, 15, spare).float()


def fold_(x: Tensor, shift: int, spare: Tensor) -> Tensor:
    """x ^= x >> shift, with `spare` to hold the shifted."""
    return x.bitwise_xor_(torch.bitwise_right_shift(x, shift, out=spare))


def mix64(x: Tensor) -> Tensor:
    """splitmix64's finalizer on int64, which wraps as it should."""
    x = (x ^ logical_shift(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ logical_shift(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ logical_shift(x, 31)


def logical_shift(x: Tensor, n: int) -> Tensor:
    """x >> n on int64 without copies of the sign."""
    return x >> n & (1 << 64 - n) - 1
