"""The priming comparison as tables and figures, from what the stages left.

    OUT/report/table.md, table.json     accuracy on the test questions, of every student and of the teacher with each text
    OUT/report/accuracy.png             bars by run, a panel a rule
    OUT/report/training.png             held-out loss on the worked solutions over each run
    OUT/report/attention.png            entropy and mass on the question's numbers by layer, from OUT/attention
    OUT/report/heads.png                how each head's mass on the question's numbers changed, from there too

Each figure has its numbers beside it as .csv.
"""

from __future__ import annotations

import argparse
import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

from megakd.errors import quiet_pipe, told_in_one_line
from megakd.reporting.jsonl import read_jsonl
from megakd.reporting.own_folder import OwnFolder, write_text
from megakd.reporting.plots import draw_lines, new_figure, plot_comparison, save

STUDENTS = {  # folder of the evaluation: title, its bar, and what the paper's student of that kind got, of 1,319
    "student": ("no distillation", "start", 161),
    "sft": ("fine-tuning only", "SFT", 303),
    "kd-none": ("KD, no text", "none", 404),
    "kd-confidence": ("KD, confidence", "check", 499),
    "kd-teacher": ("KD, teacher", "teacher", 558),
    "kd-ground-truth": ("KD, ground truth", "truth", 635),
    "kd-hint": ("KD, right answer told", "told", None),
    "kd-original": ("KD, ground truth, published objective", "published", None),
}
TEACHERS = {f"teacher-{text}": f"teacher, {text}" for text in ("none", "confidence", "teacher", "ground-truth")}
PAPERS_QUESTIONS = 1319
RULES = {"gsm8k_robust": "robust", "gsm8k_strict": "strict", "gsm8k_flexible": "flexible"}
COLUMNS = ["robust, %", "strict, %", "flexible, %", "tokens", "LM loss", "KL(q‖p)"]


def main() -> None:
    args = parse_args()
    with told_in_one_line():
        write(args)


def write(args: argparse.Namespace) -> None:
    """Tables and figures.

    Raises:
        UserError: OUT/report is somebody else's, or cannot be written.
    """
    own = OwnFolder(args.out / "report", "report_priming.py", flag="--out")
    own.check()
    own.claim()
    results = {name: json.loads((args.out / "evaluation" / name / "results.json").read_text()) for name in (*STUDENTS, *TEACHERS)}
    sets = {name: result["sets"]["gsm8k"] for name, result in results.items()}
    draw(sets, args.out, own.path)
    made = origin(args, results["student"])
    write_text(own.path / "table.json", json.dumps({"made": made, "sets": sets, "seconds": seconds(args.out)}, indent=2) + "\n")
    write_text(own.path / "table.md", tables(sets, made))


def tables(sets: dict[str, dict], made: dict) -> str:
    """Markdown: the students beside the paper's, the teacher with each text, and how it was made."""
    students = [[title, *scores(sets[name]), published(count)] for name, (title, _, count) in STUDENTS.items()]
    teachers = [[title, *scores(sets[name])] for name, title in TEACHERS.items()]
    count = sets["student"]["samples"]
    libraries = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    notes = [
        f"{count} questions, greedy answers, one training seed. The standard error of a share p of them is sqrt(p (1 - p) / {count}), "
        f"{100 * (0.25 / count) ** 0.5:.1f} points at most.",
        "robust: the number stated last; strict: boxed or after \"the answer is\"; flexible: the paper's four rules. LM loss: nats a token "
        "on the worked solutions, and there KL(q‖p) of student q to the teacher p that reads no text. paper: its own counts (Llama 3.1, "
        "some answers marked by hand, all KD by the published objective).",
        f"`{made['command']}`, commit {made['commit']}, {made['date']}, {made['device']}, {libraries}.",
    ]
    return "\n\n".join([table(["student", *COLUMNS, "paper, %"], students), table(["asked with", *COLUMNS], teachers), *notes]) + "\n"


def table(head: list[str], rows: list[list[str]]) -> str:
    """One of them."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def scores(numbers: dict) -> list[str]:
    """A row's cells."""
    kl = f"{numbers['reverse_kl']:.4f}" if "reverse_kl" in numbers else "-"
    return [*(f"{numbers[name]:.1f}" for name in RULES), f"{numbers['response_length']:.1f}", f"{numbers['lm_loss']:.4f}", kl]


def published(count: int | None) -> str:
    """Per cent by count."""
    return "-" if count is None else f"{100 * count / PAPERS_QUESTIONS:.1f}"


def origin(args: argparse.Namespace, result: dict) -> dict:
    """How the numbers came about."""
    date = datetime.now(UTC).date().isoformat()
    command = f"bash scripts/recipes/priming.sh {args.scale} OUT"
    return {"command": command, "commit": args.commit, "date": date} | {name: result[name] for name in ("device", "versions")}


def seconds(out: Path) -> dict[str, int]:
    """Of each stage."""
    lines = (line.split() for line in (out / "logs" / "seconds.txt").read_text().splitlines())
    return {stage: int(count) for stage, count in lines}


def draw(sets: dict[str, dict], out: Path, folder: Path) -> None:
    """Every figure."""
    bars = {bar: {title: sets[name][rule] for rule, title in RULES.items()} for name, (_, bar, _) in STUDENTS.items()}
    plot_comparison(bars, dict.fromkeys(RULES.values(), "% of answers"), folder / "accuracy.png")
    plot_training(out, folder / "training.png")
    for name, figure in {"attention": "comparison", "heads": "number_mass_change"}.items():
        for kind in ("png", "csv"):
            shutil.copyfile(out / "attention" / "figures" / f"{figure}.{kind}", folder / f"{name}.{kind}")


def plot_training(out: Path, path: Path) -> None:
    """Held-out loss of every run that has one."""
    points = {}
    for name, (title, *_) in STUDENTS.items():
        rows = read_jsonl(out / name / "metrics.jsonl") if name != "student" else []
        found = [(row["iteration"], row["valid/lm_loss"]) for row in rows if "valid/lm_loss" in row]
        points |= {title: tuple(map(list, zip(*found)))} if found else {}
    figure, (ax,) = new_figure(rows=1, columns=1)
    draw_lines(ax, points)
    ax.set(title="held-out loss on worked solutions", ylabel="nats per token", xlabel="iteration", yscale="log")
    rows = [[title, *point] for title, pair in points.items() for point in zip(*pair)]
    save(figure, path, ["run", "iteration", "valid/lm_loss"], rows)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="OUT of priming.sh")
    parser.add_argument("--scale", required=True, help="SCALE of priming.sh, for the line that says how the table was made")
    parser.add_argument("--commit", default="unknown", help="of the code, for the same line")
    with quiet_pipe():
        return parser.parse_args()


if __name__ == "__main__":
    main()
