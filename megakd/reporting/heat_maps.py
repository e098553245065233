"""Figures of layers and heads: heat maps, and lines by layer. Their numbers stand beside them as .csv."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from megakd.reporting.plots import new_figure, save, styles

COLUMNS = 4  # panels in a row


def plot_heat_maps(maps: Mapping[str, np.ndarray], path: Path, *, title: str, unit: str, around_zero: bool = False) -> list[Path]:
    """A panel a map [layers, heads], all of one colour scale; `around_zero`: of changes, white where there is none."""
    columns = min(COLUMNS, len(maps))
    figure, axes = new_figure(rows=math.ceil(len(maps) / columns), columns=columns)
    largest = max(float(np.abs(values).max()) for values in maps.values()) or 1.0
    scale = {"cmap": "RdBu_r", "vmin": -largest, "vmax": largest} if around_zero else {"cmap": "viridis", "vmin": 0.0, "vmax": largest}
    for ax, (name, values) in zip(axes, maps.items()):
        image = ax.imshow(values, aspect="auto", interpolation="nearest", **scale)
        ax.grid(visible=False)
        ax.set(title=name, xlabel="head", ylabel="layer")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.yaxis.get_major_locator().set_params(integer=True)
    for ax in axes[len(maps) :]:
        ax.remove()
    figure.colorbar(image, ax=axes[: len(maps)], label=unit)
    figure.suptitle(title)
    table = [[name, *index, value] for name, values in maps.items() for index, value in np.ndenumerate(values)]
    return save(figure, path, ["model", "layer", "head", "value"], table)


def plot_by_layer(panels: Mapping[str, tuple[str, Mapping[str, np.ndarray]]], path: Path) -> list[Path]:
    """A panel a measure: title → unit, and a line of values by layer for each model."""
    figure, axes = new_figure(rows=1, columns=len(panels))
    for ax, (title, (unit, lines)) in zip(axes, panels.items()):
        for (name, values), (colour, dash) in zip(lines.items(), styles(lines)):
            ax.plot(range(len(values)), values, color=colour, linestyle=dash, label=name, marker="o", markersize=3)
        ax.set(title=title, xlabel="layer", ylabel=f"{unit}, mean over heads", ylim=(0, None))
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0].legend(frameon=False, fontsize="small")
    table = [
        [title, name, layer, value]
        for title, (_, lines) in panels.items()
        for name, values in lines.items()
        for layer, value in enumerate(values)
    ]
    return save(figure, path, ["measure", "model", "layer", "value"], table)
