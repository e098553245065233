"""Figures of a run and of a comparison of methods, each with the numbers it shows beside it as .csv.

Colours are those of Okabe and Ito, told apart with any colour vision; lines also differ in style.
"""

import csv
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from megakd.errors import UserError, file_errors
from megakd.reporting.jsonl import read_jsonl

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")
PANELS = {  # names begin with: title, unit
    "loss/": ("Training losses", "nats per token"),
    "grad_norm": ("Gradient norm", "before clipping"),
    "tokens_per_second": ("Throughput", "tokens per second"),
    "time/": ("Where the time goes", "seconds per iteration"),
    "lr": ("Learning rate", ""),
    "on_policy_share": ("DistiLLM's share of own text", "of batches"),
    "real_share": ("Real positions", "of those computed"),
    "memory_gib": ("Peak memory", "GiB"),
}
COUNTS = ("tokens", "positions")  # of a batch: no curve
HELD_OUT = {  # valid/*: title, unit
    "valid/reverse_kl": ("Held-out KL(q‖p)", "nats per token"),
    "valid/lm_loss": ("Held-out LM loss", "nats per token"),
    "valid/exact_match": ("Held-out exact match", "% of answers"),
    "valid/rouge_l": ("Held-out Rouge-L", "F-measure × 100"),
    "valid/response_length": ("Held-out answers", "tokens"),
    **{f"valid/gsm8k_{rule}": (f"Held-out GSM8K, {rule}", "% of answers") for rule in ("robust", "strict", "flexible")},
}
EXPOSURE_BIAS = {  # statistic: title, unit
    "ex_acc_err": ("ExAccErr(l)", "%"),
    "R": ("R(l), own responses", "nats"),
    "l_eps": ("lε(l), teacher's responses", "nats"),
}

Series = dict[str, tuple[list[int], list[float]]]  # name: iterations, values


def plot_training(run_folder: str | Path) -> list[Path]:
    """figures/training.png and .csv from metrics.jsonl: losses, gradient norm, throughput, time, held-out metrics.

    Raises UserError where the folder has no metrics.
    """
    run_folder = Path(run_folder)
    rows = read_jsonl(run_folder / "metrics.jsonl")
    if not rows:
        raise UserError(f"{run_folder / 'metrics.jsonl'} holds no iteration; give the --save folder of a run that has started")
    series = series_of(rows)
    panels = panels_of(series)
    if not panels:  # every iteration was left out
        return []
    columns = min(4, len(panels))
    figure, axes = new_figure(rows=math.ceil(len(panels) / columns), columns=columns)
    for ax, (title, unit, names) in zip(axes, panels):
        draw = draw_stack if names[0].startswith("time/") else draw_lines
        draw(ax, {name: series[name] for name in names})
        ax.set(title=title, ylabel=unit, xlabel="iteration", ylim=(min(0, ax.get_ylim()[0]), None))
    for ax in axes[len(panels) :]:
        ax.remove()
    header = ["iteration", *series]
    return save(figure, run_folder / "figures" / "training.png", header, [[row.get(name) for name in header] for row in rows])


def plot_comparison(results: Mapping[str, Mapping[str, float]], units: Mapping[str, str], path: str | Path) -> list[Path]:
    """One panel of bars a metric, one bar a method; `path` (.png) and its numbers as .csv.

    results: method → metric → value; where `m_sd` is given too, `m` has an error bar. units: metric → unit, a panel each.
    """
    figure, axes = new_figure(rows=1, columns=len(units))
    for ax, (metric, unit) in zip(axes, units.items()):
        bars = {method: (row[metric], row.get(f"{metric}_sd")) for method, row in results.items() if metric in row}
        draw_bars(ax, bars, order=list(results))
        ax.set(title=metric, ylabel=unit)
    names = list(dict.fromkeys(name for row in results.values() for name in row))
    table = [[method, *(row.get(name) for name in names)] for method, row in results.items()]
    return save(figure, Path(path), ["method", *names], table)


def plot_exposure_bias(
    curves: Mapping[str, Mapping[str, Sequence[float | None]]], path: str | Path, *, order: Sequence[str] = ()
) -> list[Path]:
    """One panel a statistic, one line a data set (or method) over the response length, with the error of its mean; and .csv.

    curves: data set → `l`, and R, l_eps, ex_acc_err each with _sem, as lists by length; None: not defined there. order: see styles.
    """
    figure, axes = new_figure(rows=1, columns=len(EXPOSURE_BIAS))
    for ax, (name, (title, unit)) in zip(axes, EXPOSURE_BIAS.items()):
        for (data, columns), (colour, dash) in zip(curves.items(), styles(curves, order)):
            draw_band(ax, columns, name, label=data, color=colour, linestyle=dash)
        ax.set(title=title, ylabel=unit, xlabel="response length l, tokens")
    axes[0].legend(frameon=False, fontsize="small")
    names = list(next(iter(curves.values())))
    table = [[data, *row] for data, columns in curves.items() for row in zip(*columns.values())]
    return save(figure, Path(path), ["data", *names], table)


def draw_band(ax: "Axes", columns: Mapping[str, Sequence[float | None]], name: str, **line) -> None:
    """A mean and the error around it, where there is one."""
    mean, error = ([math.nan if value is None else value for value in columns[key]] for key in (name, f"{name}_sem"))
    ax.plot(columns["l"], mean, **line)
    low, high = ([value + sign * e for value, e in zip(mean, error)] for sign in (-1, 1))
    ax.fill_between(columns["l"], low, high, color=line["color"], alpha=0.2, linewidth=0)


def series_of(rows: Sequence[Mapping[str, float]]) -> Series:
    """Each metric with the iterations at which it was finite."""
    series: Series = {}
    for row in rows:
        for name, value in row.items():
            if name != "iteration" and isinstance(value, int | float):
                iterations, values = series.setdefault(name, ([], []))
                iterations.append(int(row["iteration"]))
                values.append(value)
    return series


def panels_of(series: Series) -> list[tuple[str, str, list[str]]]:
    """Title, unit and metrics of each panel. Held-out metrics, and what a method logs beside, have a panel each: their units differ."""
    shown = [name for name in series if name != "time/evaluation"]  # now and then, not in an iteration
    panels = [(title, unit, [name for name in shown if name.startswith(start)]) for start, (title, unit) in PANELS.items()]
    panels += [(*HELD_OUT.get(name, (name, "")), [name]) for name in series if not name.startswith((*PANELS, *COUNTS))]
    return [panel for panel in panels if panel[2]]


def new_figure(*, rows: int, columns: int) -> "tuple[Figure, Sequence[Axes]]":
    """A figure and its axes, row by row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # seconds of imports, only for those who draw; no window
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * columns, 3.2 * rows), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="0.9")
        ax.set_axisbelow(True)
    return figure, axes


def styles(names: Iterable[str], order: Sequence[str] = ()) -> Iterator[tuple[str, str]]:
    """Colour and dash of each name: the same in every panel and figure that has the same `order`, the names' own by default."""
    names = list(names)
    known = dict(zip(order or names, zip(cycle(COLOURS), cycle(DASHES))))
    return (known[name] for name in names)


def draw_lines(ax: "Axes", series: Series, order: Sequence[str] = ()) -> None:
    """One line a metric; noisy ones pale, with their running mean on top. order: see styles."""
    for (name, (iterations, values)), (colour, dash) in zip(series.items(), styles(series, order)):
        if len(values) > 50:
            ax.plot(iterations, values, color=colour, alpha=0.25, linewidth=0.8)
            ax.plot(iterations, running_mean(values), color=colour, linestyle=dash, label=label_of(name))
        else:
            ax.plot(iterations, values, color=colour, linestyle=dash, label=label_of(name), marker="o", markersize=3)
    if len(series) > 1:
        ax.legend(frameon=False, fontsize="small")


def draw_stack(ax: "Axes", series: Series) -> None:
    """The metrics one upon the other, at the iterations that have them all: the upper edge is their sum."""
    at = [dict(zip(*points)) for points in series.values()]
    shared = sorted(set.intersection(*map(set, at)))
    layers = [running_mean([values[iteration] for iteration in shared]) for values in at]
    ax.stackplot(shared, layers, labels=list(map(label_of, series)), colors=COLOURS, edgecolor="white", linewidth=0.5)
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(handles[::-1], labels[::-1], fontsize="small", loc="lower left")  # in the order of the layers


def draw_bars(ax: "Axes", bars: Mapping[str, tuple[float, float | None]], order: Sequence[str] = ()) -> None:
    """Method → value and standard deviation (or None), each value written over its bar, the deviation as far as it fits.

    order: see styles.
    """
    for x, ((method, (value, deviation)), (colour, _)) in enumerate(zip(bars.items(), styles(bars, order))):
        drawn = ax.bar(x, value, yerr=deviation, color=colour, width=0.7, capsize=4, label=method)
        text = f"{value:#.3g}" if deviation is None or len(bars) > 4 else f"{value:.3g} ± {deviation:.2g}"
        ax.bar_label(drawn, labels=[text], padding=3, fontsize="small")
    slanted = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if len(bars) > 3 else {}
    ax.set_xticks(range(len(bars)), list(bars), **slanted)
    ax.margins(y=0.15)


def label_of(name: str) -> str:
    """`time/student_step` -> `student step`."""
    return name.split("/")[-1].replace("_", " ")


def running_mean(values: Sequence[float]) -> list[float]:
    """Mean of each value and its neighbours, a fiftieth of the run to either side."""
    reach = len(values) // 50
    parts = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def save(figure: "Figure", path: Path, header: Sequence[str], table: Sequence[Sequence]) -> list[Path]:
    """The figure, and its numbers beside it."""
    with file_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *table])
    return [path, path.with_suffix(".csv")]
