"""Predictions for the pairs of the PromptKD paper on 4 and 8 cards, by the recipes of configs/: python scripts/plan_pairs.py

Everything is simulated or estimated, nothing runs on a GPU: docs/gpu.md says what that sees. Models are their sizes alone. Of each pair
every TP × DP that both models take is tried, without pipeline stages, which within a machine only add waiting; the quickest that fits is
chosen. What is in --out already stays, so that a call that was cut off goes on.
"""

import argparse
import json
import tempfile
from pathlib import Path

from megakd.errors import quiet_pipe

ROOT = Path(__file__).parents[1]


PAIRS = ("gpt2-base", "gpt2-medium", "gpt2-large", "opt-1.3b", "opt-2.7b", "opt-6.7b", "llama-7b")  # scales of configs/
HEAD = """# Predictions for the paper's pairs

**Nothing here was measured.** `python scripts/plan_pairs.py` makes this page, `planned.json` and `planned.png`: memory is simulated, times
are estimated (`docs/gpu.md`). PromptKD by the recipes of `configs/` in bfloat16, every prompt of 256 tokens and every response of 256,
micro-batches of 16 rows and `--use-distributed-optimizer`. A machine is so many H100 or A100 of 80 GB, with the links of one node. Of the
layouts without pipeline stages the quickest that fits was chosen; those that cannot hold their weights, gradients and moments were not
simulated and are not listed.
"""
MICRO_BATCH = 16  # rows, where the recipe has fewer: GPT-2's 2 leave a GPU waiting for its host


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/planned", help="for planned.json, its table and its figure")
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS), help="recipes of configs/")
    parser.add_argument("--gpus", nargs="+", type=int, default=[8, 4], help="cards")
    parser.add_argument("--gpu", nargs="+", choices=["h100", "a100"], default=["h100", "a100"], help="of 80 GB both")
    with quiet_pipe():
        asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    file = asked.out / "planned.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    for gpu, cards, pair in ((gpu, cards, pair) for gpu in asked.gpu for cards in asked.gpus for pair in asked.pairs):
        if (key := f"{pair}, {cards} {gpu}") not in found:
            found[key] = planned(pair, cards, gpu)
            file.write_text(json.dumps(found, indent=1) + "\n")
            print(f"{key}: {found[key]['layouts'][0]}", flush=True)
    (asked.out / "README.md").write_text(page(found))
    draw(found, asked.out / "planned.png")


def planned(pair: str, cards: int, gpu: str) -> dict:
    """The layouts, the best first, and of the best GiB and seconds by part."""
    from megakd.config import parse
    from megakd.config.plan import PlanConfig
    from megakd.planning.plan import plans
    from megakd.planning.scale import model_of, read_scale

    configs = ROOT / "configs" / pair
    with tempfile.TemporaryDirectory() as folder:
        for role in ("student", "teacher"):
            model_of(read_scale(configs), role).save_pretrained(Path(folder) / role)
        flags = ["--config", str(configs / "promptkd.yaml"), "--model", f"{folder}/student", "--teacher-model", f"{folder}/teacher"]
        flags += ["--gpu", gpu, "--gpus", str(cards)]
        flags += ["--rank-layouts", "--most-stages", "1", "--keep-best", "", "--micro-batch-size", str(MICRO_BATCH)]
        flags += ["--use-distributed-optimizer"]
        made = plans(parse(flags, PlanConfig, program="plan.py"))
    best = made[0]
    layouts = [{"layout": str(plan.layout), "gib": plan.need_gib, "fits": plan.fits, "seconds": plan.iteration_s} for plan in made]
    return {
        "layouts": layouts,
        "peaks": best.fullest.peaks,
        "alive": best.fullest.alive[best.fullest.peak_part],
        "seconds": {part: best.seconds(part) for part in best.parts},
        "launches": {part: round(work.launches) for part, work in best.fullest.works.items()},
    }


def page(found: dict) -> str:
    """Markdown: what was assumed, and the tables."""
    from megakd.planning.page import ASSUMED

    launches = ["| chosen layout of | launches outside the rollout's graphs | of the rollout |", "|---|---|---|"]
    for key, told in found.items():
        written = told["launches"].get("rollout", 0)
        launches.append(f"| {key} | {sum(told['launches'].values()) - written:,} | {written:,} |")
    return "\n".join([HEAD, *table(found), "", "![GiB at the peak](planned.png)", "", *launches, "", ASSUMED, ""])


def table(found: dict) -> list[str]:
    """Markdown, a line a pair and machine."""
    from megakd.planning.scale import read_scale

    head = ["teacher → student", "cards", "layout", "GiB a card, of 79", "seconds an iteration", "other layouts that fit", "that do not"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for key, told in found.items():
        (pair, machine), (best, *others) = key.split(", "), told["layouts"]
        fit = ", ".join(f"{other['layout']} ({other['seconds']:.1f} s)" for other in others if other["fits"])
        no = ", ".join(f"{other['layout']} ({other['gib']:.0f} GiB)" for other in others if not other["fits"])
        teacher, student = (read_scale(ROOT / "configs" / pair)[role]["name"].split("/")[-1] for role in ("teacher", "student"))
        name = f"{teacher} → {student}"
        lines.append(f"| {name} | {machine} | {best['layout']} | {best['gib']:.1f} | {best['seconds']:.2f} | {fit} | {no} |")
    return lines


def draw(found: dict, path: Path) -> None:
    """Bars: what is alive at the peak of the chosen layout, of every pair and number of H100s."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from megakd.reporting.plots import COLOURS

    shown = {key: told for key, told in found.items() if key.endswith("h100")}
    makers = list(dict.fromkeys(maker for told in shown.values() for maker, size in told["alive"].items() if size > 2**28))
    names = [f"{key.removesuffix(' h100')}\n{told['layouts'][0]['layout']}" for key, told in shown.items()]
    figure, axes = plt.subplots(figsize=(9, 0.55 * len(names) + 2), layout="constrained")
    left = [0.0] * len(names)
    for maker, colour in zip(makers, COLOURS * 3):
        sizes = [told["alive"].get(maker, 0) / 2**30 for told in shown.values()]
        axes.barh(names, sizes, left=left, color=colour, label=f"made in {maker}")
        left = [a + b for a, b in zip(left, sizes)]
    axes.axvline(79.1, color="black", linestyle="--", label="card")
    axes.invert_yaxis()
    axes.set(xlabel="GiB at the peak of the fullest rank: simulated, not measured", title="PromptKD on H100s of 80 GB")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
