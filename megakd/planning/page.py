"""A plan for people: a page of text, and a figure of what is alive at each part's peak."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from megakd.config.plan import PlanConfig
from megakd.errors import file_errors
from megakd.planning.plan import OUTSIDE_GIB, Plan, Stage
from megakd.reporting.plots import COLOURS
from megakd.simulation.cards import REACHED_BANDWIDTH, REACHED_FLOPS, REACHED_LINK

GIB, GB = 2**30, 1e9
LEAST_SHOWN = 0.002  # of the peak
ASSUMED = (
    f"Estimated, nothing was measured: kernels reach {REACHED_FLOPS:.0%} of the data sheet's FLOPs and {REACHED_BANDWIDTH:.0%} of its "
    f"bandwidth, links {REACHED_LINK:.0%}; messages do not overlap with work; the host needs 6 µs a launch, and Python none. "
    f"Rows are as long as the flags allow, unless --prompt-tokens and --response-tokens say otherwise. Outside of torch's allocator "
    f"{OUTSIDE_GIB} GiB are allowed for."
)


def page(config: PlanConfig, plans: list[Plan]) -> str:
    """Markdown: the best layout in full, then all of them in a table."""
    best = plans[0]
    lines = [f"# {config.method}: {best.layout} on {config.plan.gpu}", "", verdict(config, best), "", *memory(best), "", *time(best), ""]
    lines += [*messages(best), ""]
    if len(plans) > 1:
        lines += [*ranking(plans), ""]
    return "\n".join([*lines, ASSUMED])


def verdict(config: PlanConfig, plan: Plan) -> str:
    """Whether it fits."""
    stage, need = plan.fullest, plan.need_gib
    where = f"in {stage.peak_part}" + (f" on stage {stage.number}" if plan.layout.pp > 1 else "")
    does = "fits" if plan.fits else "does not fit"
    return f"{need:.1f} GiB a card at most ({plan.peak_gib:.1f} of tensors, {where}): it {does} on {plan.card.memory_gib:.0f} GiB."


def memory(plan: Plan) -> list[str]:
    """GiB at the peak of each part, by what was alive then, on the fullest rank."""
    stage = plan.fullest
    makers = shown(stage)
    head = ["| GiB at the peak of | all | " + " | ".join(f"made in {maker}" for maker in makers) + " |"]
    head.append("|---|" + "---|" * (1 + len(makers)))
    cells = lambda alive: " | ".join(f"{alive.get(maker, 0) / GIB:.2f}" for maker in makers)
    return head + [f"| {part} | {peak / GIB:.2f} | {cells(stage.alive[part])} |" for part, peak in stage.peaks.items()]


def shown(stage: Stage) -> list[str]:
    """The parts that made anything worth a column."""
    sizes = ((maker, size) for alive in stage.alive.values() for maker, size in alive.items())
    return list(dict.fromkeys(maker for maker, size in sizes if size >= LEAST_SHOWN * max(stage.peaks.values())))


def time(plan: Plan) -> list[str]:
    """Seconds by part, and what they come from, on the fullest rank."""
    lines = ["| part | seconds | launches | TFLOP | GB read and written | device s | messages s | host s ≥ |", "|---|" + "---|" * 7]
    for part, work in plan.fullest.works.items():
        numbers = f"{work.launches:,.0f} | {work.flops / 1e12:.1f} | {work.bytes / GB:.1f} | {work.device_s:.3f} | {work.message_s:.3f}"
        lines.append(f"| {part} | {plan.seconds(part):.3f} | {numbers} | {work.host_s:.3f} |")
    return [*lines, f"| iteration | {plan.iteration_s:.2f} | | | | | | |"]


def messages(plan: Plan) -> list[str]:
    """Collectives and sends of an iteration, on the fullest rank."""
    rows = sorted(plan.fullest.messages.items(), key=lambda row: -row[1][1])
    if not rows:
        return ["No messages: a single rank."]
    lines = ["| operation | ranks | calls | GB |", "|---|---|---|---|"]
    return lines + [f"| {operation} | {ranks} | {calls:,.0f} | {size / GB:.3f} |" for (operation, ranks), (calls, size) in rows]


def ranking(plans: list[Plan]) -> list[str]:
    """All layouts, the best first."""
    lines = ["| layout | GiB a card | fits | seconds an iteration |", "|---|---|---|---|"]
    return lines + [f"| {plan.layout} | {plan.need_gib:.1f} | {'yes' if plan.fits else 'no'} | {plan.iteration_s:.2f} |" for plan in plans]


def write(config: PlanConfig, plans: list[Plan]) -> None:
    """plan.md, plan.json and plan.png in --out.

    Raises:
        UserError: the folder cannot be written.
    """
    out = Path(config.plan.out)
    with file_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / "plan.md").write_text(page(config, plans) + "\n")
        (out / "plan.json").write_text(json.dumps([numbers(plan) for plan in plans], indent=1) + "\n")
        draw(plans[0], out / "plan.png")


def numbers(plan: Plan) -> dict:
    """Everything, in bytes and seconds."""
    stages = [
        {"stage": s.number, "peaks": s.peaks, "alive": s.alive, "work": {part: asdict(work) for part, work in s.works.items()},
         "messages": [[*key, *value] for key, value in s.messages.items()]}
        for s in plan.stages
    ]  # fmt: skip
    return {"layout": str(plan.layout), "fits": plan.fits, "peak_gib": plan.peak_gib, "iteration_s": plan.iteration_s, "stages": stages}


def draw(plan: Plan, path: Path) -> None:
    """Bars: the peak of each part, stacked by what was alive then; a line: the card."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    stage, parts = plan.fullest, list(plan.fullest.peaks)
    makers = shown(stage)
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(parts) + 2), layout="constrained")
    left = [0.0] * len(parts)
    for maker, colour in zip(makers, COLOURS * 3):
        sizes = [stage.alive[part].get(maker, 0) / GIB for part in parts]
        axes.barh(parts, sizes, left=left, color=colour, label=f"made in {maker}")
        left = [a + b for a, b in zip(left, sizes)]
    axes.axvline(plan.card.memory_gib - OUTSIDE_GIB, color="black", linestyle="--", label="room on the card")
    axes.invert_yaxis()
    axes.set(xlabel="GiB at the part's peak, on the fullest rank (simulated)", title=str(plan.layout))
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)
