"""The comparison as one table and three figures, from what the stages left.

    OUT/report/table.md, table.json     Rouge-L by set, mean ± standard deviation over seeds; on Dolly also held-out loss, KL to
                                        the teacher and exposure bias
    OUT/report/rouge_l.png              bars by method, a panel a set
    OUT/report/training.png             held-out loss and held-out KL(q‖p) over each method's training
    OUT/report/exposure_bias.png        R(l), lε(l) and ExAccErr(l) by response length on Dolly

Each figure has its numbers beside it as .csv.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean

from megakd.errors import quiet_pipe, told_in_one_line
from megakd.evaluation.report import cell
from megakd.reporting.jsonl import read_jsonl
from megakd.reporting.own_folder import OwnFolder, write_text
from megakd.reporting.plots import Series, draw_lines, new_figure, plot_comparison, plot_exposure_bias, save

TITLES = {
    "sft_teacher": "teacher",
    "sft_student": "SFT",
    "kd": "KD",
    "seqkd": "SeqKD",
    "minillm": "MiniLLM",
    "promptkd": "PromptKD",
}
FIRST = "dolly"  # the set of the held-out columns and of the exposure bias: the one that training data are like
COLUMNS = {"lm_loss": "LM loss", "reverse_kl": "KL(q‖p)", "ex_acc_err": "ExAccErr(16), %"}
PANELS = {"valid/lm_loss": ("held-out LM loss", "nats per token"), "valid/reverse_kl": ("held-out KL(q‖p)", "nats per token")}


def main() -> None:
    args = parse_args()
    with told_in_one_line():
        write(args)


def write(args: argparse.Namespace) -> None:
    """The table and the figures.

    Raises:
        UserError: OUT/report is somebody else's, or cannot be written.
    """
    own = OwnFolder(args.out / "report", "report.py", flag="--out")
    own.check(is_older=lambda path: (path / "table.md").is_file())
    own.claim()
    results = {TITLES[name]: json.loads((args.out / "evaluation" / name / "results.json").read_text()) for name in args.methods}
    folder = own.path
    draw(results, args.out, folder)
    write_text(folder / "table.json", json.dumps(summary(results, args.out), indent=2, ensure_ascii=False) + "\n")
    write_text(folder / "table.md", table(results))


def table(results: dict[str, dict]) -> str:
    """Markdown: a row a method."""
    sets = list(next(iter(results.values()))["sets"])
    lines = [["method", *sets, "mean", *(f"{title}, {FIRST}" for title in COLUMNS.values())]]
    lines += [["---", *["---:"] * (len(lines[0]) - 1)]]
    for method, result in results.items():
        scores = [cell(result["sets"][name], "rouge_l") for name in sets]
        lines += [[method, *scores, f"{mean_score(result):.2f}", *(cell(result["sets"][FIRST], name) for name in COLUMNS)]]
    config, samples = next(iter(results.values()))["config"], [results["teacher"]["sets"][name]["samples"] for name in sets]
    sizes = ", ".join(f"{count} {name}" for name, count in zip(sets, samples))
    note = f"Rouge-L, mean ± standard deviation over {len(config['seeds'])} seeds; rows: {sizes}."
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{note}\n"


def mean_score(result: dict) -> float:
    """Rouge-L, every set alike."""
    return fmean(numbers["rouge_l"] for numbers in result["sets"].values())


def summary(results: dict[str, dict], out: Path) -> dict:
    """The table's numbers and more, for programs."""
    seconds = (line.split() for line in (out / "logs" / "seconds.txt").read_text().splitlines())
    return {
        "methods": {method: result["sets"] | {"mean": {"rouge_l": mean_score(result)}} for method, result in results.items()},
        "seconds": {stage: int(count) for stage, count in seconds},
        **{name: results["teacher"][name] for name in ("device", "layout", "versions")},
    }


def draw(results: dict[str, dict], out: Path, folder: Path) -> None:
    """Every figure."""
    bars = {method: by_set(result["sets"]) for method, result in results.items()}
    sets = next(iter(results.values()))["sets"]
    plot_comparison(bars, dict.fromkeys(sets, "Rouge-L"), folder / "rouge_l.png")
    plot_training(out, folder / "training.png")
    curves = {method: result["exposure_bias"][FIRST] for method, result in results.items() if result["exposure_bias"]}
    plot_exposure_bias(curves, folder / "exposure_bias.png", order=list(results))


def by_set(sets: dict[str, dict]) -> dict[str, float]:
    """Rouge-L under the set's name, its deviation under name_sd."""
    scores = {name: numbers["rouge_l"] for name, numbers in sets.items()}
    return scores | {f"{name}_sd": numbers["rouge_l_sd"] for name, numbers in sets.items() if "rouge_l_sd" in numbers}


def plot_training(out: Path, path: Path) -> None:
    """Held-out metrics of every run that has them, a panel a metric."""
    panels = {name: curves(out, name) for name in PANELS}
    figure, axes = new_figure(rows=1, columns=len(panels))
    for ax, (name, series) in zip(axes, panels.items()):
        draw_lines(ax, series, order=list(TITLES.values()))
        title, unit = PANELS[name]
        ax.set(title=title, ylabel=unit, xlabel="iteration")
    table = [
        [name, method, *point] for name, series in panels.items() for method, points in series.items() for point in zip(*points)
    ]
    save(figure, path, ["metric", "method", "iteration", "value"], table)


def curves(out: Path, name: str) -> Series:
    """One held-out metric of each run: iterations and values."""
    rows = {title: read_jsonl(out / run / "metrics.jsonl") for run, title in TITLES.items()}
    points = {title: [(row["iteration"], row[name]) for row in rows if name in row] for title, rows in rows.items()}
    return {title: tuple(map(list, zip(*pairs))) for title, pairs in points.items() if pairs}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="OUT of paper.sh")
    parser.add_argument("--methods", nargs="+", required=True, choices=TITLES, help="runs to compare, in the table's order")
    with quiet_pipe():
        return parser.parse_args()


if __name__ == "__main__":
    main()
