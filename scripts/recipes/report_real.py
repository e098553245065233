"""The comparison on a real model as one table, four figures and answers side by side, from what the stages left.

    OUT/report/table.md, table.json     a row a run: Rouge-L by set, losses, KL both ways, length, exposure bias
    OUT/report/summary.png              mean Rouge-L, and the KL to the teacher: the first thing to look at
    OUT/report/rouge_l.png              bars by method, of the first seed of training, a panel a set
    OUT/report/training.png             held-out loss and KL over iterations, and over the tokens that were learnt from
    OUT/report/exposure_bias.png        R(l), lε(l) and ExAccErr(l) by response length
    OUT/report/samples.md               the first questions with every model's answer

Each figure has its numbers beside it as .csv. --best N writes nothing: it prints the N runs with the highest mean Rouge-L, best first.
"""

from __future__ import annotations

import argparse
import json
import re
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from statistics import fmean

from report import by_set

from megakd.errors import quiet_pipe, told_in_one_line
from megakd.evaluation.report import cell
from megakd.reporting.jsonl import read_jsonl
from megakd.reporting.own_folder import OwnFolder, write_text
from megakd.reporting.plots import draw_lines, new_figure, plot_comparison, plot_exposure_bias, save

TITLES = {
    "teacher": "teacher",
    "healed": "start (healed)",
    "sft": "SFT",
    "kd": "KD",
    "seqkd": "SeqKD",
    "minillm": "MiniLLM",
    "on_policy_kd": "on-policy KD",
    "promptkd": "PromptKD",
    "promptkd_primed": "PromptKD + text",
}
FIRST_SEED = "10"
SCORED = ("dolly", "self-inst", "vicuna")  # by Rouge-L
COLUMNS = {  # of Dolly's gold answers, but for the length and the exposure bias
    "reverse_kl": "KL(q‖p)", "forward_kl": "KL(p‖q)", "lm_loss": "LM loss", "response_length": "length", "ex_acc_err": "ExAccErr(16), %",
}  # fmt: skip
SUMMARY = {"Rouge-L of answers: higher is better": "mean of the sets", "KL(q‖p) to the teacher: lower is better": "nats a token"}
CURVES = {"valid/lm_loss": "held-out LM loss", "valid/reverse_kl": "held-out KL(q‖p)"}
QUESTIONS, CHARACTERS = 6, 600  # of the answers side by side


def main() -> None:
    args = parse_args()
    with told_in_one_line():
        results = read_results(args.out)
        if args.best is None:
            write(args, results)
        else:
            print("\n".join(best(results, args.best)))


def read_results(out: Path) -> dict[str, dict]:
    """What evaluate.py left of every run, in the table's order."""
    found = {file.parent.name: json.loads(file.read_text()) for file in (out / "evaluation").glob("*/results.json")}
    order = list(TITLES)
    return dict(sorted(found.items(), key=lambda item: (order.index(method_of(item[0])), item[0])))


def method_of(run: str) -> str:
    """`promptkd-10` is one of promptkd."""
    return run.partition("-")[0]


def title_of(run: str) -> str:
    """With the seed of training where it is not the first."""
    method, _, seed = run.partition("-")
    return TITLES[method] + (f", seed {seed}" if seed not in ("", FIRST_SEED) else "")


def best(results: dict[str, dict], count: int) -> list[str]:
    """Methods by their first run's mean Rouge-L."""
    runs = [run for run in results if run.endswith(f"-{FIRST_SEED}")]
    return [method_of(run) for run in sorted(runs, key=lambda run: -mean_score(results[run]["sets"]))[:count]]


def mean_score(sets: dict[str, dict]) -> float:
    """Rouge-L, every set of questions alike."""
    return fmean(sets[name]["rouge_l"] for name in SCORED if name in sets)


def write(args: argparse.Namespace, results: dict[str, dict]) -> None:
    """Tables and figures.

    Raises:
        UserError: OUT/report is somebody else's, or cannot be written.
    """
    own = OwnFolder(args.out / "report", "report_real.py", flag="--out")
    own.check()
    own.claim()
    sets = {run: result["sets"] for run, result in results.items()}
    learnt = {run: tokens_learnt(args.out / run) for run in results if run != "teacher"}
    made = origin(args, results["teacher"])
    write_text(own.path / "table.json", json.dumps({"made": made, "sets": sets, "tokens": learnt}, indent=2, ensure_ascii=False) + "\n")
    write_text(own.path / "table.md", table(sets, learnt, made))
    write_text(own.path / "samples.md", samples(args.out, results))
    draw(args.out, results, own.path)


def table(sets: dict[str, dict], learnt: dict[str, int], made: dict) -> str:
    """Markdown: a row a run, and how it was made."""
    teacher, scored = sets["teacher"], [name for name in SCORED if name in sets["teacher"]]
    wikitext = ["LM loss, wikitext"] * ("wikitext" in teacher)
    lines = [["run", "tokens, k", *scored, "mean", *COLUMNS.values(), *wikitext]]
    lines += [["---", *["---:"] * (len(lines[0]) - 1)]]
    for run, numbers in sets.items():
        tokens = f"{learnt[run] / 1000:.0f}" if learnt.get(run) else "-"
        scores = [*(cell(numbers[name], "rouge_l") for name in scored), f"{mean_score(numbers):.2f}"]
        losses = [*(cell(numbers["dolly"], name) for name in COLUMNS), *(cell(numbers["wikitext"], "lm_loss") for _ in wikitext)]
        lines += [[title_of(run), tokens, *scores, *losses]]
    rows = ", ".join(f"{numbers['samples']} {name}" for name, numbers in teacher.items())
    notes = [
        f"Rouge-L, mean ± standard deviation over {made['seeds']} seeds of sampling; rows: {rows}. q is the student, p the teacher; losses "
        "in nats a token. tokens: of responses, learnt from in all steps. Every run but the teacher and the start takes as many steps of "
        "as many rows; training.png has them over tokens, too.",
        f"`{made['command']}`, commit {made['commit']}, {made['date']}, {made['device']}, "
        + ", ".join(f"{name} {version}" for name, version in made["versions"].items()) + ".",
    ]  # fmt: skip
    return "\n\n".join(["\n".join(f"| {' | '.join(line)} |" for line in lines), *notes]) + "\n"


def tokens_learnt(run: Path) -> int:
    """Supervised tokens of all steps."""
    return round(sum(row.get("tokens", 0) for row in read_jsonl(run / "metrics.jsonl")))


def samples(out: Path, results: dict[str, dict]) -> str:
    """The first questions of Dolly: the right answer, and what every run's first seed says."""
    runs = [run for run in results if not run.endswith("-20")]
    answers, blocks = {run: first_answers(out / "evaluation" / run / "answers.jsonl") for run in runs}, []
    for i, row in enumerate(answers["teacher"][:QUESTIONS]):
        said = {"right answer": row["references"][0]} | {title_of(run): answers[run][i]["answer"] for run in runs}
        lines = [f"| {who} | {in_a_cell(text)} |" for who, text in said.items()]
        blocks.append("\n".join([f"**{in_a_cell(asked(row['prompt']))}**", "", "| | |", "| --- | --- |", *lines]))
    return "\n\n".join(blocks) + "\n"


def first_answers(file: Path) -> list[dict]:
    """To Dolly's questions, by the first seed of sampling."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if (row["set"], row["seed"]) == ("dolly", rows[0]["seed"])]


def asked(prompt: str) -> str:
    """The user's turn of a rendered chat."""
    return re.split(r"<\|im_end\|>", prompt.rpartition("<|im_start|>user\n")[2])[0]


def in_a_cell(text: str) -> str:
    """One line of Markdown, cut where it is long."""
    line = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
    return line if len(line) <= CHARACTERS else line[:CHARACTERS] + " …"


def origin(args: argparse.Namespace, result: dict) -> dict:
    """How the numbers came about."""
    command = f"SCALE={args.scale} bash scripts/recipes/real.sh OUT"
    date = datetime.now(UTC).date().isoformat()
    told = {name: result[name] for name in ("device", "versions", "layout")}
    return {"command": command, "commit": args.commit, "date": date, "seeds": len(result["config"]["seeds"])} | told


def draw(out: Path, results: dict[str, dict], folder: Path) -> None:
    """Every figure."""
    scored = [name for name in SCORED if name in results["teacher"]["sets"]]
    runs = [run for run in results if "-" not in run or run.endswith(f"-{FIRST_SEED}")]
    bars = {title_of(run): by_set(results[run]["sets"]) for run in runs}
    plot_comparison(bars, dict.fromkeys(scored, "Rouge-L"), folder / "rouge_l.png")
    plot_comparison({run: summary(sets) for run, sets in by_method(results).items()}, SUMMARY, folder / "summary.png")
    runs = [run for run in runs if run.endswith(f"-{FIRST_SEED}")]
    plot_training(out, runs, folder / "training.png")
    curves = {title_of(run): results[run]["exposure_bias"]["dolly"] for run in runs}
    plot_exposure_bias(curves, folder / "exposure_bias.png", order=list(TITLES.values()))


def by_method(results: dict[str, dict]) -> dict[str, list[dict[str, dict]]]:
    """The sets of a method's runs, one a seed of training."""
    found: dict[str, list[dict[str, dict]]] = {}
    for run, result in results.items():
        found.setdefault(TITLES[method_of(run)], []).append(result["sets"])
    return found


def summary(runs: list[dict[str, dict]]) -> dict[str, float]:
    """The numbers of SUMMARY, means over training seeds; the teacher has no KL to itself."""
    score, kl = SUMMARY
    far = [sets["dolly"]["reverse_kl"] for sets in runs if "reverse_kl" in sets["dolly"]]
    return {score: fmean(map(mean_score, runs))} | ({kl: fmean(far)} if far else {})


def plot_training(out: Path, runs: list[str], path: Path) -> None:
    """Held-out numbers over iterations and over tokens: equal steps are not equal tokens."""
    figure, axes = new_figure(rows=2, columns=len(CURVES))
    points = {run: held_out(read_jsonl(out / run / "metrics.jsonl")) for run in runs}
    table = [[title_of(run), *point] for run in runs for point in points[run]]
    for i, title in enumerate(CURVES.values()):
        for row, unit in enumerate(("iteration", "thousand tokens learnt from")):
            found = {title_of(run): [(point[row], point[2 + i]) for point in points[run] if point[2 + i] is not None] for run in runs}
            ax = axes[row * len(CURVES) + i]
            draw_lines(ax, {run: tuple(map(list, zip(*pairs))) for run, pairs in found.items() if pairs}, order=list(TITLES.values()))
            ax.set(title=title, ylabel="nats per token", xlabel=unit)
    save(figure, path, ["run", "iteration", "thousand tokens", *CURVES], table)


def held_out(rows: list[dict]) -> list[list[float | None]]:
    """Iteration, thousands of tokens learnt from until then, and the numbers of CURVES, wherever they were measured."""
    learnt = accumulate(row.get("tokens", 0) / 1000 for row in rows)
    return [[row["iteration"], tokens, *map(row.get, CURVES)] for row, tokens in zip(rows, learnt) if CURVES.keys() & row.keys()]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="OUT of real.sh")
    parser.add_argument("--scale", required=True, help="SCALE of real.sh, for the line that says how the table was made")
    parser.add_argument("--commit", default="unknown", help="of the code, for the same line")
    parser.add_argument("--best", type=int, metavar="N", help="print the N best methods")
    with quiet_pipe():
        return parser.parse_args()


if __name__ == "__main__":
    main()
