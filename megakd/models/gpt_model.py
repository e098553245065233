"""megatron-core's GPTModel that takes a soft prompt in front and hands out hidden states instead of logits.

S sequence, B batch, H hidden, P soft prompt positions, V vocabulary.

The output layer is applied by the loss (megakd_kernels.fused_linear_*), in pieces, so that [S, B, V] never exists.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import megakd_kernels
import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region, scatter_to_sequence_parallel_region
from torch import Tensor

from megakd.models.kv_cache import CacheStep
from megakd.models.narrow_words import narrow_words
from megakd.models.packed_rows import PackedRows
from megakd.models.rope import Rope
from megakd.models.word_rows import word_rows
from megakd.runtime.parallel_layout import ParallelLayout

METHOD_PARTS = "method_parts."  # what begins the names of parameters that are no part of the model


class HiddenStateGPTModel(GPTModel):
    """One pipeline stage. megatron's own attribute `vocab_size` is the padded vocabulary, `real_vocab_size` the ids that count.

    `method_parts` are modules that a method trains with the model: they share its optimizer and its checkpoints, and no export.
    """

    def __init__(
        self,
        config,
        block_spec,
        *,
        layout: ParallelLayout,
        real_vocab_size: int,
        padded_vocab_size: int,
        padding_idx: int | None = None,
        ropes: Sequence[Rope] = (),
        embedding_size: int | None = None,
        embedding_scale: float = 1.0,
        **kwargs,
    ):
        super().__init__(
            config,
            block_spec,
            vocab_size=padded_vocab_size,
            pre_process=layout.is_first_stage,
            post_process=layout.is_last_stage,
            parallel_output=True,
            scatter_embedding_sequence_parallel=False,  # the prompt is put in front of the whole sequence, then it is scattered
            pg_collection=layout.groups,
            **kwargs,
        )
        self.layout, self.real_vocab_size, self.padding_idx, self.ropes = layout, real_vocab_size, padding_idx, ropes
        self.embedding_size = embedding_size or config.hidden_size  # what the output layer reads, too
        self.embedding_scale = torch.tensor(embedding_scale).to(config.params_dtype).item()  # rounded as the family's own code does
        self.project_in = self.project_out = None
        if self.embedding_size != config.hidden_size:
            narrow_words(self, self.embedding_size)
        self.method_parts = torch.nn.ModuleDict()
        self.words_summed_by_rows = self.words_awaited = False
        self.adapted = None  # the LoRAConfig of its adapters, beside which its own weights are frozen

    def forward(
        self,
        tokens_BS: Tensor,
        position_ids_BS: Tensor,
        soft_prompt_PH: Tensor | None = None,
        packed_lengths: Sequence[int] | None = None,
        *,
        rotary: Tensor | None = None,
        step: CacheStep | None = None,
    ) -> Tensor:
        """Hidden states of the S real positions, [S, B, H], whole on every TP rank of the last stage; else the next stage's input.
        With narrow words the last stage's are as wide as these, [S, B, E].

        Packed rows stand one behind the other, [1, S]; `packed_lengths` has the positions of each, in front of which it gets the soft
        prompt, and attention stays inside it.

        Decoding (`step`) says where columns stand: it passes position ids and rotary table of all P + S columns, and gets hidden
        states of as many.
        """
        decodes = step is not None
        first = 0 if soft_prompt_PH is None else soft_prompt_PH.shape[0]
        packed = None
        if packed_lengths:
            packed = PackedRows.behind_prompts(packed_lengths, first, multiple=self._sequence_parts, device=tokens_BS.device)
        embedded = self._embed(tokens_BS, position_ids_BS, soft_prompt_PH, decodes, packed) if self.pre_process else None
        if self.adapted and self.training and self.config.recompute_granularity and embedded is not None:
            embedded.requires_grad_()  # else a checkpointed layer would take the parameters in it for frozen
        hidden = self.decoder(
            hidden_states=embedded,
            attention_mask=None,
            rotary_pos_emb=rotary if decodes else self._rotary(embedded, packed),
            inference_context=step,
            packed_seq_params=packed,
        )
        if not self.post_process:
            return hidden
        if not decodes:
            if self.config.sequence_parallel:
                hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False, group=self.tp_group)
            hidden = packed.without_prompts(hidden) if packed else hidden[first : first + tokens_BS.shape[1]]
        return hidden if self.project_out is None else self.project_out(hidden)

    def p2p_shape(
        self, tokens_BS: Tensor, soft_prompt_PH: Tensor | None = None, packed_lengths: Sequence[int] | None = None
    ) -> tuple[int, int, int]:
        """[P + S, B, H] that goes from stage to stage, packed [R P + S, 1, H] of R rows; of it this rank's part under sequence
        parallelism."""
        rows, positions = tokens_BS.shape
        positions += 0 if soft_prompt_PH is None else soft_prompt_PH.shape[0] * len(packed_lengths or (0,))
        return math.ceil(positions / self._sequence_parts), rows, self.config.hidden_size

    @property
    def _sequence_parts(self) -> int:
        """Equal parts that a sequence is cut into."""
        return self.tp_group.size() if self.config.sequence_parallel else 1

    def rotary_tables(self, positions: int) -> Tensor | None:
        """[kinds of layers, 2, positions, 1, d], for `rope.rotate`; None for a model with learned positions."""
        return torch.stack([rope.table(positions, self.config.params_dtype) for rope in self.ropes]) if self.ropes else None

    def _rotary(self, embedded: Tensor | None, packed: PackedRows | None) -> Tensor | None:
        """Those of positions 0, 1, ... of every row, [kinds, 2, S, 1, 1, d]; embedded None: on later stages."""
        received = self.decoder.input_tensor if embedded is None else embedded
        tables = self.rotary_tables(packed.max_seqlen_q if packed else received.shape[0] * self._sequence_parts)
        if tables is None:
            return None
        return (tables[:, :, packed.position_ids] if packed else tables)[:, :, :, None]

    def _embed(
        self, tokens_BS: Tensor, position_ids_BS: Tensor, soft_prompt_PH: Tensor | None, decodes: bool, packed: PackedRows | None
    ) -> Tensor:
        """[P + S, B, H], packed [R P + S, 1, H]; this rank's part of it under sequence parallelism."""
        if soft_prompt_PH is None or decodes or packed or self.project_in is not None or self.embedding_scale != 1:
            x = self.word_embeddings(tokens_BS)
            if soft_prompt_PH is not None and packed:
                x = packed.with_prompts(soft_prompt_PH, x[0])[None]
            elif soft_prompt_PH is not None:
                x = torch.cat([soft_prompt_PH.to(x.dtype).expand(len(x), -1, -1), x], 1)
            if self.project_in is not None:
                x = self.project_in(x)
            if self.embedding.add_position_embedding:
                if soft_prompt_PH is not None and not decodes:
                    position_ids_BS = packed.position_ids[: x.shape[1]] if packed else torch.arange(x.shape[1], device=x.device)
                x = x + self.embedding.position_embeddings(position_ids_BS)
        else:
            x = self._embed_behind(soft_prompt_PH, tokens_BS)
        x = x.transpose(0, 1).contiguous()
        x = self.embedding.embedding_dropout(x.view(x.shape) if packed else x)  # one row's strides keep torch from plain matrix products
        if self.config.sequence_parallel:
            x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[0] % self.tp_group.size()))  # equal parts; nothing real sees what comes last
            x = scatter_to_sequence_parallel_region(x, group=self.tp_group)
        return x

    def word_embeddings(self, tokens_BS: Tensor) -> Tensor:
        """[B, S, E]. As with torch's `padding_idx`, that id's row learns nothing from being read; a tied head still teaches it."""
        words = self.embedding.word_embeddings
        by_rows = self.words_summed_by_rows and words.weight.requires_grad and torch.is_grad_enabled()
        x = word_rows(words, tokens_BS, awaited=self.words_awaited) if by_rows else words(tokens_BS)
        if self.embedding_scale != 1:
            x = x * self.embedding_scale
        if self.padding_idx is None or not torch.is_grad_enabled():
            return x
        return torch.where((tokens_BS == self.padding_idx)[..., None], x.detach(), x)

    def sum_words_by_rows(self, *, awaited: bool) -> None:
        """Inside a DistributedDataParallel: add the word embedding's gradient to its sums, a row for each token read. `awaited`: gradients
        travel during the backward pass, for which one of every weight has to come by."""
        self.words_summed_by_rows, self.words_awaited = True, awaited

    def _embed_behind(self, soft_prompt_PH: Tensor, tokens_BS: Tensor) -> Tensor:
        """[B, P + S, H]: the prompt takes positions 0..P-1 and moves the tokens P to the right, as in the reference. The model is
        frozen: gradient goes to the prompt alone."""
        positions = self.embedding.position_embeddings.weight if self.embedding.add_position_embedding else None
        words, group = self.embedding.word_embeddings.weight, self.tp_group if self.tp_group.size() > 1 else None
        return megakd_kernels.prompt_embedding(tokens_BS, words, soft_prompt_PH, positions, tp_group=group)

    def output_weight(self) -> Tensor:
        """This rank's rows of the output layer, [V_padded / tp, H]; only on the last stage."""
        return self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else self.output_layer.weight
