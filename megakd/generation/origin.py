"""What an answer file was made from, as checksums: a file is continued only with the data, the model and the template that began it."""

from __future__ import annotations

from pathlib import Path

from megakd.checkpointing.fingerprint import all_files, checksum, model_files
from megakd.config import GenerateConfig


def checksums(config: GenerateConfig) -> dict[str, str]:
    """SHA-256 in hexadecimal, by the setting that names what it is of; of a template only where it is a file.

    Raises:
        UserError: a file cannot be read.
    """
    template = Path(config.responses.prompt_template)
    named = {"model": model_files(Path(config.model)), "data": all_files(Path(config.data))}
    named |= {"soft_prompt": all_files(Path(config.soft_prompt))} if config.soft_prompt else {}
    named |= {"prompt_template": [template]} if template.is_file() else {}
    return {name: checksum(files, whole=name != "model") for name, files in named.items()}
