"""From nothing to a distilled student in minutes, on two CPU cores: data, teacher, student, PromptKD at TP 2, a table and a figure.

    python scripts/quickstart.py --out quickstart

Nothing is downloaded: the data are the project's own small tasks, the models are random GPT-2s. Every step is a command that works
the same on a cluster; it is printed before it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
LENGTHS = "--max-length 16 --max-prompt-length 10"
TRAINING = "--micro-batch-size 32 --global-batch-size 64 --log-interval 50"
TEACHER = {"n_layer": 4, "n_embd": 128, "n_head": 4}
STUDENT = {"n_layer": 2, "n_embd": 64, "n_head": 4}


def main() -> None:
    out = parse_args().out.resolve()
    started = time.perf_counter()
    run("prepare_data.py", f"--out {out}/data")
    for name, sizes in {"teacher": TEACHER, "student": STUDENT}.items():
        random_gpt2(out / f"{name}-init", sizes, out / "data" / "tokenizer")
    train_models(out)
    results = evaluate_models(out)
    print_table(results)
    draw(results, out / "comparison.png")
    check_loads(out / "promptkd" / "hf")
    print(f"\n{time.perf_counter() - started:.0f} s; the distilled student is {out / 'promptkd' / 'hf'}, the figure {out / 'comparison.png'}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("quickstart"), help="folder to fill (default: quickstart)")
    return parser.parse_args()


def train_models(out: Path) -> None:
    """A teacher that learns from 20,000 answers, a student that gets 1,000, and the same student taught by the teacher."""
    data, valid = out / "data", f"--valid-data {out}/data/valid.jsonl"
    few = f"--train-data {data}/train_few.jsonl {valid}"
    many = f"--train-data {data}/train.jsonl {valid}"
    sft = f"{LENGTHS} {TRAINING} --method sft"
    run("pretrain_kd.py", f"{sft} --model {out}/teacher-init {many} --train-iters 400 --lr 2e-3 --save {out}/teacher", ranks=2)
    run("pretrain_kd.py", f"{sft} --model {out}/student-init {few} --train-iters 400 --lr 3e-3 --save {out}/student", ranks=2)
    run("pretrain_kd.py", f"{sft} --model {out}/student/hf {few} --train-iters 300 --lr 1e-3 --save {out}/student-longer", ranks=2)
    run(
        "pretrain_kd.py",
        f"{LENGTHS} {TRAINING} --method promptkd --model {out}/student/hf --teacher-model {out}/teacher/hf {many} --train-iters 300 "
        f"--lr 1e-3 --teacher-lr 1e-3 --tensor-model-parallel-size 2 --save {out}/promptkd",
        ranks=2,
    )


def evaluate_models(out: Path) -> dict[str, dict[str, float]]:
    """Exact match, Rouge-L and KL to the teacher on prompts that nobody trained on."""
    names = {"teacher": "teacher", "student (SFT)": "student", "student (SFT, longer)": "student-longer", "student (PromptKD)": "promptkd"}
    results = {}
    for title, run_name in names.items():
        run(
            "evaluate.py",
            f"--model {out}/{run_name}/hf --teacher-model {out}/teacher/hf --data test={out}/data/test.jsonl --max-prompt-length 10 "
            f"--max-new-tokens 6 --greedy --save {out}/evaluation/{run_name}",
            ranks=2,
        )
        results[title] = json.loads((out / "evaluation" / run_name / "results.json").read_text())["sets"]["test"]
    return results


def random_gpt2(folder: Path, sizes: dict[str, int], tokenizer_folder: Path) -> None:
    """An untrained GPT-2 with the data's tokenizer, as an ordinary Hugging Face folder."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(0)
    eos = tokenizer.eos_token_id
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=32, bos_token_id=eos, eos_token_id=eos, **sizes, **dropouts)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run(script: str, arguments: str, *, ranks: int = 1) -> None:
    """One of the project's commands, printed as a person would type it."""
    launcher = TORCHRUN if ranks > 1 else [sys.executable]
    shown = f"torchrun --nproc_per_node {ranks}" if ranks > 1 else "python"
    print(f"\n$ {shown} scripts/{script} {arguments}", flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # a rank a core: more threads than cores are slower by far
    subprocess.run([*launcher, str(ROOT / "scripts" / script), *shlex.split(arguments)], check=True, env=environment)


METRICS = {"exact_match": "exact match, %", "rouge_l": "Rouge-L", "reverse_kl": "KL(q‖p), nats a token"}


def print_table(results: dict[str, dict[str, float]]) -> None:
    print(f"\n{'':24}" + "".join(f"{unit:>24}" for unit in METRICS.values()))
    for title, row in results.items():
        print(f"{title:24}" + "".join(f"{row[name]:24.3f}" for name in METRICS))


def draw(results: dict[str, dict[str, float]], path: Path) -> None:
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
