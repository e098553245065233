"""megakd_checkpoint.json: what a checkpoint says about itself."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import megakd
from megakd.checkpointing.json_fields import described
from megakd.errors import UserError, read_json

FILE = "megakd_checkpoint.json"
FORMAT_VERSION = 2  # 1 had no checksums


def versions() -> dict[str, str]:
    """Of megakd and of the libraries that write and read a checkpoint."""
    return {"megakd": megakd.__version__} | {name: version(name) for name in ("torch", "megatron-core", "transformers")}


def layout_dict(tp: int, pp: int, dp: int = 1) -> dict[str, int]:
    """A layout as files name it: Megatron's flags."""
    return {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "data_parallel_size": dp}


@dataclass(frozen=True, kw_only=True)
class Description:
    """`layout` is the layout it was written at; it loads at any other."""

    iteration: int
    vocab_size: int
    padded_vocab_size: int
    layout: dict[str, int]
    teacher_layout: dict[str, int] | None = None
    adapter: dict | None = None  # PEFT's adapter_config.json, where these are adapters beside the weights of another folder
    versions: dict[str, str] = field(default_factory=versions)
    format_version: int = FORMAT_VERSION

    def write(self, folder: Path) -> None:
        """Into `folder` as megakd_checkpoint.json."""
        (folder / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Description:
        """
        Raises:
            UserError: missing, damaged, or of a newer format.
        """
        file = folder / FILE
        if not file.is_file():
            raise UserError(
                f"{file}: missing, so this is not a megakd checkpoint; give a folder that megakd or hf_to_mp.py wrote"
            )
        try:
            fields = read_json(file)
            newer = fields["format_version"] > FORMAT_VERSION
            found = None if newer else described(cls, fields)
        except (TypeError, KeyError) as error:
            raise UserError(f"{file}: damaged ({error}); copy the checkpoint again") from error
        if newer:
            raise UserError(
                f"{file}: format version {fields['format_version']}, this megakd reads up to {FORMAT_VERSION}; use a newer megakd"
            )
        return found
