"""A model by its name on the Hugging Face hub, in this machine's cache: HF_HUB_CACHE, by default HF_HOME/hub. Nothing is downloaded."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from megakd.errors import UserError

FETCH = "hf download"


def local_folder(path: str | Path, *, flag: str) -> Path:
    """The folder itself; of the name of a repository that is no folder here, as in org/name, the cache's snapshot of its main branch.

    Raises:
        UserError: it might be such a name, and the cache lacks it.
    """
    path, name = Path(path), str(path)
    if os.path.exists(path) or path.is_absolute() or name.startswith(".") or not 1 <= len(path.parts) <= 2:
        return path
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except HFValidationError:
        return path
    except LocalEntryNotFoundError:
        if len(path.parts) == 1:
            return path
        raise UserError(
            f"{flag} {name}: no such folder, and no such model in the hub's cache {constants.HF_HUB_CACHE}; give a folder, or fetch it "
            f"with `{FETCH} {name}`"
        ) from None
