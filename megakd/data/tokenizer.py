"""The tokenizer of a Hugging Face folder, and what distillation needs of it: its EOS, and that teacher and student share it.

Text is encoded without special tokens, in training and in evaluation alike; EOS, the end that is taught (end_ids.py), is appended
to responses and pads.
"""

from importlib.metadata import version
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megakd.data.end_ids import end_ids
from megakd.errors import UserError, read_json, said
from megakd.model_files import file_in, small_files

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
PROBE = "Below is an instruction.\n\n### Response:\n  It's 12,345 tokens — naïve?"  # merges, digits, spaces, bytes


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, its EOS the end that is taught, pad = EOS. Reads local files only.

    Raises UserError where the folder has no usable tokenizer, or names no end.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{folder} holds none of {', '.join(TOKENIZER_FILES)}; copy the model's tokenizer files into it")
    small_files(folder)
    check_versions(folder / "tokenizer_config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exceptions, transformers whatever comes of odd fields
        raise UserError(f"{folder}: its tokenizer does not load ({said(error)}); {_way_out(error)}") from error
    tokenizer.own_eos_token = tokenizer.eos_token
    tokenizer.eos_token_id = end_ids(folder, tokenizer).taught
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_versions(config: Path) -> None:
    """Its field fast_tokenizer_files, of which transformers takes one in place of tokenizer.json, names files beside it.

    Raises:
        UserError: it names others, or the file is damaged.
    """
    fields = read_json(config) if config.is_file() else {}
    if not isinstance(fields, dict):
        raise UserError(f"{config}: holds a JSON {type(fields).__name__} where an object is needed; copy or download it again")
    names = fields.get("fast_tokenizer_files") or ()
    for name in names if isinstance(names, list | tuple) else [names]:
        file_in(config.parent, name, named_by=config)


def _way_out(error: Exception) -> str:
    """tokenizers' own words for a kind of model, normaliser, ... that it does not know yet, or for a damaged file."""
    if "untagged enum" in str(error) or "unknown variant" in str(error):
        return f"tokenizer.json was written by a newer tokenizers than {version('tokenizers')}: install a newer one, or it is damaged"
    return (
        "the folder needs tokenizer.json, or the model's config.json beside vocab.json and merges.txt, or tokenizer.model; copy or "
        "download them again"
    )


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that is put behind a response of the data."""
    return tokenizer.eos_token_id


def own_eos_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What the tokenizer's files call eos_token, and so does a chat template, whichever end is taught."""
    return getattr(tokenizer, "own_eos_token", tokenizer.eos_token)


def check_same_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raises UserError unless both spell every id alike and split text alike.

    Embedding rows beyond the tokenizer's ids may differ in number; that is the models' business. Ends may differ, too: what a run
    writes ends at those of either.
    """
    names = f"--teacher-model {teacher.name_or_path} and --model {student.name_or_path}"
    ours, theirs = ({index: token for token, index in tok.get_vocab().items()} for tok in (student, teacher))
    way_out = _way_out_of_added_tokens(student, teacher, ours, theirs) or "distil between models that share a tokenizer"
    for index in sorted(ours.keys() | theirs.keys()):
        if ours.get(index) != theirs.get(index):
            raise UserError(
                f"{names} have different tokenizers: id {index} is {theirs.get(index)!r} for the teacher and "
                f"{ours.get(index)!r} for the student; {way_out}"
            )
    if encode(student, [PROBE]) != encode(teacher, [PROBE]):
        raise UserError(f"{names} have the same ids but split {PROBE!r} differently; {way_out}")


def _way_out_of_added_tokens(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, ours: dict[int, str], theirs: dict[int, str]
) -> str | None:
    """Where one has what the other has and a few tokens more, such as a [PAD] of its own: rows are padded with EOS, and need none."""
    more, fewer, flag = (theirs, ours, "--teacher-model") if len(theirs) > len(ours) else (ours, theirs, "--model")
    added = {index for index in more if index not in fewer}
    tokenizer, other = (teacher, student) if more is theirs else (student, teacher)
    if not added or any(more.get(index) != token for index, token in fewer.items()) or not added <= tokenizer.added_tokens_decoder.keys():
        return None
    return (
        f"only added tokens differ, and rows are padded with EOS: copy the tokenizer files of {other.name_or_path} into a copy of {flag}"
    )


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, no special tokens, nothing truncated."""
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
