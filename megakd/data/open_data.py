"""From a path of any form to samples, by the settings of the run: the one door through which training gets its data."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megakd.config import DataConfig
from megakd.data.batch import Sample
from megakd.data.conditioning import Conditioning
from megakd.data.indexed import IndexedDataset, is_indexed, shard_files
from megakd.data.prompt_dataset import PromptDataset
from megakd.data.sft_dataset import NO_RESPONSE, SFTDataset
from megakd.data.tables import table_files
from megakd.errors import UserError


def data_files(path: str) -> list[Path]:
    """The files whose rows are read, of a path of any form."""
    if is_indexed(path):
        return [file for ids in shard_files(Path(path)) for file in (ids, ids.with_suffix(".idx"))]
    return table_files(Path(path)) if Path(path).is_dir() else [Path(path)]


def open_prompts(
    path: str, tokenizer: PreTrainedTokenizerBase, data: DataConfig, *, conditioning: Conditioning | None = None
) -> Sequence[Sample]:
    """Prompts to be answered; `conditioning`: what the teacher reads in their place."""
    if is_indexed(path):
        return open_indexed(path, tokenizer, data, conditioning, prompts_only=True)
    options = {"template": data.prompt_template, "conditioning": conditioning}
    return PromptDataset(path, tokenizer, max_prompt_length=data.max_prompt_length, **options)


def open_responses(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    *,
    conditioning: Conditioning | None = None,
    full_rows: bool = False,
    no_response: str = NO_RESPONSE,
) -> Sequence[Sample]:
    """Prompts with their responses, or text; `full_rows` and `no_response`: see SFTDataset."""
    if is_indexed(path):
        return open_indexed(path, tokenizer, data, conditioning)
    lengths = {"max_length": data.max_length, "max_prompt_length": data.max_prompt_length}
    options = {"template": data.prompt_template, "conditioning": conditioning, "full_rows": full_rows, "no_response": no_response}
    return SFTDataset(path, tokenizer, **lengths, **options)


def open_indexed(
    path: str, tokenizer: PreTrainedTokenizerBase, data: DataConfig, conditioning: Conditioning | None = None, **options
) -> IndexedDataset:
    """Ids as they are in the file: no template, and no EOS but theirs.

    Raises:
        UserError: the teacher is to read more, and there is no text to put it to; or the files cannot be used.
    """
    if conditioning and conditioning.settings.adds_text:
        flag = "--teacher-priming" if conditioning.settings.priming != "none" else "--teacher-prompt-field"
        raise UserError(f"{path} holds token ids, and {flag} needs text; give the .jsonl they were made from")
    lengths = {"max_length": data.max_length, "max_prompt_length": data.max_prompt_length}
    return IndexedDataset(Path(path), vocab_size=len(tokenizer), **lengths, **options)
