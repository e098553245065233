"""From nothing to a distilled student in minutes, on two CPU cores: data, teacher, student, PromptKD at TP 2, table and figure.

    python scripts/quickstart.py --out quickstart

Nothing is downloaded: the data are the project's own small tasks, the models start as random Llamas. Every step is a command that
works the same on a cluster; it is printed before it runs.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from megakd.errors import quiet_pipe, told_in_one_line
from megakd.reporting.own_folder import OwnFolder

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a core for each rank: more threads than cores are slower by far

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
LENGTHS = "--max-length 24 --max-prompt-length 18"
OPTIMIZER = "--global-batch-size 64 --adam-beta2 0.95 --lr-decay-style linear --log-interval 50"
TEACHER = {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 336}
STUDENT = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 168}

MODELS = {  # title in the table: folder
    "teacher": "teacher",
    "student (SFT)": "student",
    "student (SFT, longer)": "student-longer",
    "student (PromptKD)": "promptkd",
}


def main() -> None:
    args = parse_args()
    out = args.out.expanduser().resolve()
    with told_in_one_line():
        folder = OwnFolder(out, "quickstart.py", flag="--out")
        folder.check(is_older=lambda path: (path / "data" / "train_few.jsonl").is_file())
        folder.claim()
    started = time.perf_counter()
    run("prepare_data.py", f"--out {out}/data --seed {args.seed}")
    for name, sizes in {"teacher": TEACHER, "student": STUDENT}.items():
        random_llama(out / f"{name}-init", sizes, out / "data" / "tokenizer", seed=args.seed)
    train_models(out, args.seed, args.share)
    check_loads(out / "promptkd" / "hf")
    results = evaluate_models(out)
    print_table(results)
    draw(results, out / "comparison.png")
    seconds = time.perf_counter() - started
    print(f"\n{seconds:.0f} s; the distilled student is {out / 'promptkd' / 'hf'}, the figure {out / 'comparison.png'}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("quickstart"), help="folder to fill (default: quickstart)")
    parser.add_argument("--seed", type=int, default=1234, help="of data, models and training (default: 1234)")
    parser.add_argument("--share", type=fraction, default=1.0, help="of the iterations: 0.1 shows sooner that all runs here (default: 1)")
    with quiet_pipe():
        return parser.parse_args()


def fraction(text: str) -> float:
    """For argparse's `type`: above 0, at most 1."""
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share of the iterations; use a number above 0, at most 1")
    return float(text)


def train_models(out: Path, seed: int, share: float) -> None:
    """A teacher learns from 20,000 answers, a student from 600; it then goes on with its answers, or with its teacher. `share`: of
    the iterations that this takes."""
    scaled = lambda whole: max(1, round(share * whole))
    few, many = f"--train-data {out}/data/train_few.jsonl", f"--train-data {out}/data/train.jsonl"
    common = f"{LENGTHS} {OPTIMIZER} --seed {seed} --valid-data {out}/data/valid.jsonl"
    first = f"--method sft {common} --lr-warmup-iters {scaled(30)} --lr 4e-3"
    further = f"--model {out}/student/hf {common} --micro-batch-size 64 --train-iters {scaled(200)} --lr 2e-3"
    distil = f"--method promptkd --teacher-model {out}/teacher/hf --tensor-model-parallel-size 2"
    distil += " --prompt-len 6"  # the soft prompt starts as "Suppose you are a student.", six tokens, a preamble of the data
    _train(f"{first} --model {out}/teacher-init {many} --micro-batch-size 32 --train-iters {scaled(300)} --save {out}/teacher", ranks=2)
    _train(f"{first} --model {out}/student-init {few} --micro-batch-size 64 --train-iters {scaled(200)} --save {out}/student")
    _train(f"--method sft {further} {few} --save {out}/student-longer")
    _train(f"{distil} {further} {many} --save {out}/promptkd", ranks=2)


def evaluate_models(out: Path) -> dict[str, dict[str, float]]:
    """Exact match, Rouge-L and KL to the teacher on prompts that nobody trained on. One process for all saves their starts."""
    from megakd.config import EvaluateConfig, parse
    from megakd.evaluation.evaluator import evaluate
    from megakd.runtime.initialize import process_group_closed_at_exit

    lengths = "--max-prompt-length 18 --max-new-tokens 6 --greedy --micro-batch-size 64 --overwrite"
    results = {}
    with process_group_closed_at_exit():
        for title, name in MODELS.items():
            folders = f"--model {out}/{name}/hf --teacher-model {out}/teacher/hf --save {out}/evaluation/{name}"
            arguments = f"{folders} --data test={out}/data/test.jsonl {lengths}"
            print(f"\n$ python scripts/evaluate.py {arguments}", flush=True)
            results[title] = evaluate(parse(shlex.split(arguments), EvaluateConfig))["sets"]["test"]
    return results


def random_llama(folder: Path, sizes: dict[str, int], tokenizer_folder: Path, *, seed: int) -> None:
    """An untrained Llama with the data's tokenizer, as an ordinary Hugging Face folder."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},  # the usual 10,000 is for texts of thousands of tokens
        num_attention_heads=4,
        initializer_range=0.05,  # so narrow a model learns faster from larger weights than the usual 0.02
        tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **sizes,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _train(arguments: str, *, ranks: int = 1) -> None:
    run("pretrain_kd.py", arguments, ranks=ranks)


def run(script: str, arguments: str, *, ranks: int = 1) -> None:
    """One of the project's commands, printed as a person would type it."""
    launcher = TORCHRUN if ranks > 1 else [sys.executable]
    shown = f"torchrun --nproc_per_node {ranks}" if ranks > 1 else "python"
    print(f"\n$ {shown} scripts/{script} {arguments}", flush=True)
    subprocess.run([*launcher, str(ROOT / "scripts" / script), *shlex.split(arguments)], check=True)


METRICS = {"exact_match": "exact match, %", "rouge_l": "Rouge-L", "reverse_kl": "KL(q‖p), nats a token"}


def print_table(results: dict[str, dict[str, float]]) -> None:
    """A line a model, a column a metric."""
    print(f"\n{'':24}" + "".join(f"{unit:>24}" for unit in METRICS.values()))
    for title, row in results.items():
        print(f"{title:24}" + "".join(f"{row[name]:24.3f}" for name in METRICS))


def draw(results: dict[str, dict[str, float]], path: Path) -> None:
    """The table as bars, and its numbers as .csv beside them."""
    from megakd.reporting.plots import plot_comparison

    plot_comparison(results, METRICS, path)


def check_loads(folder: Path) -> None:
    """What comes out is an ordinary Hugging Face folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = "Reverse: k f m b\nAnswer:"
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    answer = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.eos_token_id)[0]
    print(f"\ntransformers, from {folder}: {prompt!r} -> {tokenizer.decode(answer[ids.shape[1] :], skip_special_tokens=True)!r}")


if __name__ == "__main__":
    main()
