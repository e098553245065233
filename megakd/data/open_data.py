"""From a path of any form to samples, by the settings of the run: the one door through which training gets its data."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megakd.config import DataConfig
from megakd.data.batch import Sample
from megakd.data.indexed import IndexedDataset, is_indexed
from megakd.data.prompt_dataset import PromptDataset
from megakd.data.sft_dataset import NO_RESPONSE, SFTDataset


def open_prompts(path: str, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> Sequence[Sample]:
    """Prompts to be answered."""
    if is_indexed(path):
        return open_indexed(path, tokenizer, data, prompts_only=True)
    return PromptDataset(path, tokenizer, max_prompt_length=data.max_prompt_length, template=data.prompt_template)


def open_responses(
    path: str, tokenizer: PreTrainedTokenizerBase, data: DataConfig, *, full_rows: bool = False, no_response: str = NO_RESPONSE
) -> Sequence[Sample]:
    """Prompts with their responses, or text; `full_rows` and `no_response`: see SFTDataset."""
    if is_indexed(path):
        return open_indexed(path, tokenizer, data)
    lengths = {"max_length": data.max_length, "max_prompt_length": data.max_prompt_length}
    options = {"template": data.prompt_template, "full_rows": full_rows, "no_response": no_response}
    return SFTDataset(path, tokenizer, **lengths, **options)


def open_indexed(path: str, tokenizer: PreTrainedTokenizerBase, data: DataConfig, **options) -> IndexedDataset:
    """Ids as they are in the file: no template, and no EOS but theirs."""
    lengths = {"max_length": data.max_length, "max_prompt_length": data.max_prompt_length}
    return IndexedDataset(Path(path), vocab_size=len(tokenizer), **lengths, **options)
