"""A smaller student out of a teacher: some of its layers, everything else as it is. A start for distillation, not a finished model.

python scripts/make_student.py --model TEACHER --layers 0 2 4 --save STUDENT
"""

import argparse
import sys
from pathlib import Path

from megakd.errors import file_errors, quiet_pipe, told_in_one_line
from megakd.reporting.own_folder import check_can_write


def main() -> None:
    args = parse_args()
    with told_in_one_line():
        make(args)


def make(args: argparse.Namespace) -> None:
    """Write --save.

    Raises:
        UserError: it cannot be written.
        SystemExit: it is not new or empty, or a layer is not there.
    """
    save = Path(args.save).expanduser()
    check_can_write(save, flag="--save")
    if save.is_dir() and any(save.iterdir()):
        sys.exit(f"error: --save {save}: is there already; give another folder")
    from transformers import AutoModelForCausalLM, AutoTokenizer  # seconds to import, --help none

    from megakd.data.tokenizer import TOKENIZER_FILES

    model = AutoModelForCausalLM.from_pretrained(args.model, local_files_only=True)
    keep_layers(model, args.layers)
    tokenized = any((Path(args.model) / name).is_file() for name in TOKENIZER_FILES)
    tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=True) if tokenized else None
    with file_errors(save, flag="--save"):
        model.save_pretrained(save)
        if tokenizer:
            tokenizer.save_pretrained(save)
    print(f"{save}: layers {args.layers} of {args.model}, {model.num_parameters():,} parameters")


def keep_layers(model, layers: list[int]) -> None:
    """Drop all but `layers`, in this order.

    Raises:
        SystemExit: a layer that the model does not have.
    """
    stack = next(module for module in model.modules() if type(module).__name__ == "ModuleList")
    if absent := [layer for layer in layers if not 0 <= layer < len(stack)]:
        sys.exit(f"error: --layers {absent[0]}: the model has layers 0 to {len(stack) - 1}")
    kept = [stack[layer] for layer in layers]
    del stack[:]
    stack.extend(kept)
    model.config.num_hidden_layers = len(kept)
    for field in ("layer_types", "no_rope_layers"):  # some configs say of each layer how it attends, and whether it has positions
        if of_each := getattr(model.config, field, None):
            setattr(model.config, field, [of_each[layer] for layer in layers])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder to take layers from")
    parser.add_argument("--layers", type=int, nargs="+", required=True, help="which layers, from 0, in the student's order")
    parser.add_argument("--save", required=True, help="Hugging Face folder to write")
    with quiet_pipe():
        return parser.parse_args()


if __name__ == "__main__":
    main()
