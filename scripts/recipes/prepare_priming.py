"""The data stage of the priming comparison: questions in GSM8K's form, and for the tiny scale the models that learn them.

    OUT/train.jsonl, valid.jsonl, test.jsonl     what students learn from, watch, and are asked
    OUT/test_<text>.jsonl                        the same questions as the teacher is asked them, with each priming text

From GSM8K (DATA/train.jsonl and test.jsonl): its first `train_rows` questions, the paper's choice, the next `valid_rows`, the first
`test_rows` of its test set; as chats where the scale says `chat: true`. For `tiny`, which has models of a million weights, word problems of
its own (word_problems.py), and beside them

    OUT/teacher.jsonl       what the teacher learns: the same kind of question with every text in front of it, answered as the text asks
    OUT/student.jsonl       what the student knows before it is taught: few, mostly short answers
    OUT/models/teacher, OUT/models/student     random Llamas with a tokenizer made for the texts

The folder appears at once, when all of it is there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from itertools import islice
from pathlib import Path

from word_problems import Problem, problems

from megakd.data.priming import NAMED, open_priming
from megakd.errors import file_errors, quiet_pipe, told_in_one_line
from megakd.planning.scale import read_scale

SHORT = 0.9  # of the answers to a question without any text, those that say the number at once
SEED = 1234
HINT = "hint"  # the field with the right answer, for --teacher-prompt-field


def main() -> None:
    args = parse_args()
    scale = read_scale(args.configs)
    if args.out.exists():
        sys.exit(f"error: --out {args.out}: is there already; give another folder")
    unfinished = args.out.with_name(args.out.name + ".unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)
    with told_in_one_line():
        (make_word_problems if "vocab_size" in scale else take_gsm8k)(unfinished, scale, args.data)
    os.replace(unfinished, args.out)


def write(folder: Path, name: str, rows: list[dict]) -> None:
    """One JSON object a line."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_tests(folder: Path, rows: list[dict], *, chat: bool) -> None:
    """The test questions as students are asked them, and as the teacher with each text is."""
    write(folder, "test", [as_chat(row) if chat else row for row in rows])
    for name in NAMED:
        primed = [{**row, "question": open_priming(name)(row["question"], "", row)} for row in rows]
        write(folder, f"test_{name}", [as_chat(row) if chat else row for row in primed])


def as_chat(row: dict) -> dict:
    """Question and answer as two turns; other fields stay."""
    turns = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
    return {"messages": turns} | {name: value for name, value in row.items() if name not in ("question", "answer")}


# ---- GSM8K


def take_gsm8k(folder: Path, scale: dict, data: Path) -> None:
    """Its first questions."""
    train, valid = read(data, "train", scale["train_rows"] + scale["valid_rows"]), scale["train_rows"]
    for name, rows in (("train", train[:valid]), ("valid", train[valid:])):
        write(folder, name, [as_chat(row) if scale.get("chat") else row for row in rows])
    write_tests(folder, read(data, "test", scale["test_rows"]), chat=scale.get("chat", False))


def read(data: Path, split: str, rows: int) -> list[dict]:
    """The first rows of a split, each with its right answer as the text for the teacher."""
    file = data / f"{split}.jsonl"
    with file_errors(file, way_out="DATA names the folder of GSM8K's train.jsonl and test.jsonl"), file.open(encoding="utf-8") as lines:
        found = [json.loads(line) for line in islice(lines, rows)]
    return [row | {HINT: f"The right answer is {row['answer'].rpartition('#### ')[2]}."} for row in found]


# ---- word problems


def make_word_problems(folder: Path, scale: dict, _: Path) -> None:
    """All files of the tiny scale."""
    sizes = {name: scale[f"{name}_rows"] for name in ("train", "valid", "test", "student", "teacher")}
    found = iter(problems(sum(sizes.values()), seed=SEED))
    made = {name: list(islice(found, size)) for name, size in sizes.items()}
    rng = random.Random(SEED)
    for name in ("train", "valid"):
        write(folder, name, [lesson(one) for one in made[name]])
    write_tests(folder, [lesson(one) for one in made["test"]], chat=False)
    write(folder, "student", [{"question": one.question, "answer": answer(one, "none", rng)} for one in made["student"]])
    taught = [primed(one, rng.choice([*NAMED, HINT]), rng) for one in made["teacher"]]
    write(folder, "teacher", taught)
    make_models(folder / "models", scale, [f"{row['question']}\n{row['answer']}" for row in taught[:8000]])


def lesson(one: Problem) -> dict:
    """A row that students learn: the solution, a step a line, and the right answer for a teacher that is told it."""
    return {"question": one.question, "answer": one.answer(*one.worked), HINT: f"The right answer is {one.number}."}


def primed(one: Problem, text: str, rng: random.Random) -> dict:
    """A row that the teacher learns: a question with one of the texts, or with the right answer told."""
    told = lesson(one)[HINT] if text == HINT else ""
    question = open_priming("none" if text == HINT else text)(one.question, told, {})
    return {"question": question, "answer": answer(one, text, rng)}


def answer(one: Problem, text: str, rng: random.Random) -> str:
    """As this teacher answers a question with that text: without one mostly in short, else with every step, and checked if asked to be.

    `teacher` and `ground-truth` ask for the same: how far the students that learn from them differ is chance.
    """
    if text == "none" and rng.random() < SHORT:
        return one.answer()
    return one.answer(*one.worked, *([one.check] if text == "confidence" else []))


def make_models(folder: Path, scale: dict, texts: list[str]) -> None:
    """Untrained Llamas as ordinary Hugging Face folders."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sys.path.append(str(Path(__file__).parents[1]))
    from train_tokenizer import train_tokenizer

    tokenizer = train_tokenizer(texts, vocab_size=scale["vocab_size"])
    for name in ("teacher", "student"):
        torch.manual_seed(SEED)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=scale["positions"],
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},  # texts of a hundred tokens
            num_attention_heads=4,
            initializer_range=0.05,  # so narrow a model learns faster from larger weights than the usual 0.02
            tie_word_embeddings=True,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **scale[name],
        )
        model = LlamaForCausalLM(config)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        print(f"{name}: {model.num_parameters():,} parameters, {len(tokenizer):,} ids")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=Path, required=True, help="folder of the scale, with scale.yaml")
    parser.add_argument("--data", type=Path, default=Path(), help="folder with GSM8K's train.jsonl and test.jsonl; tiny needs none")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    with quiet_pipe():
        return parser.parse_args()


if __name__ == "__main__":
    main()
