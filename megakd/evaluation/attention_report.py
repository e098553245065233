"""What an analysis of attention leaves behind.

    attention.json               settings, versions; by model the maps [layers][heads], by student the heads whose mass on numbers rose most
    figures/entropy.png          heat maps: a panel a model, a row a layer, a column a head
    figures/number_mass.png      the same of the mass on the question's numbers
    figures/*_change.png         each of the two, every student minus the base
    figures/comparison.png       both by layer, mean over heads, a line a model
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megakd.checkpointing.description import versions
from megakd.config import AttentionConfig
from megakd.errors import UserError
from megakd.reporting.heat_maps import plot_by_layer, plot_heat_maps
from megakd.reporting.own_folder import OwnFolder, write_text

if TYPE_CHECKING:
    from megakd.evaluation.attention import HeadStatistics

RESULTS = "attention.json"
TITLES = {"entropy": ("entropy of attention", "nats"), "number_mass": ("attention on the question's numbers", "share")}


def own_folder(save: str) -> OwnFolder:
    """What --save of analyze_attention.py names."""
    return OwnFolder(Path(save), "analyze_attention.py")


def check_folder(config: AttentionConfig) -> None:
    """
    Raises:
        UserError: --save is somebody else's folder, or holds an analysis, or cannot be written.
    """
    if not config.save:
        return
    own_folder(config.save).check()
    if (Path(config.save) / RESULTS).is_file() and not config.overwrite:
        raise UserError(f"--save {config.save} holds an analysis; give another folder, or --overwrite to replace it")


def summary(config: AttentionConfig, measured: Mapping[str, HeadStatistics], number_tokens: Sequence[int]) -> dict[str, Any]:
    """What attention.json holds. Means are over questions; the first model is the base."""
    names = list(measured)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "config": config.flat(),
        "versions": versions(),
        "device": device,
        "questions": len(number_tokens),
        "number_tokens": sum(number_tokens) / len(number_tokens),
        "models": {name: maps(found) for name, found in measured.items()},
        "changes": {name: change(measured[names[0]], measured[name], config.heads) for name in names[1:]},
    }


def maps(found: HeadStatistics) -> dict[str, Any]:
    """Of one model: [layers][heads], and their mean."""
    arrays = {"entropy": found.entropy_NLH.mean(0), "number_mass": found.mass_NLH.mean(0)}
    means = {f"mean_{name}": float(array.mean()) for name, array in arrays.items()}
    return {name: array.tolist() for name, array in arrays.items()} | means


def change(base: HeadStatistics, student: HeadStatistics, most: int) -> dict[str, Any]:
    """Student minus base, question by question: the mean over all heads, and the heads whose mass on numbers rose most.

    An error is that of the mean over questions (n - 1), 0 where there is one question.
    """
    of_entropy, of_mass = student.entropy_NLH - base.entropy_NLH, student.mass_NLH - base.mass_NLH
    largest = np.argsort(-of_mass.mean(0), axis=None, kind="stable")[:most]
    columns = {"base": base.mass_NLH.mean(0), "student": student.mass_NLH.mean(0), "change": of_mass.mean(0), "sem": error_of_mean(of_mass)}
    heads = [
        {"layer": int(layer), "head": int(head)} | {name: float(values[layer, head]) for name, values in columns.items()}
        for layer, head in zip(*np.unravel_index(largest, of_mass.shape[1:]))
    ]
    return {"entropy": over_heads(of_entropy), "number_mass": over_heads(of_mass), "heads": heads}


def over_heads(change_NLH: np.ndarray) -> dict[str, float]:
    """The mean of a change over all heads, and its error."""
    by_question = change_NLH.mean((1, 2))
    return {"mean": float(by_question.mean()), "sem": float(error_of_mean(by_question))}


def error_of_mean(values: np.ndarray) -> np.ndarray:
    """Over the first axis."""
    count = len(values)
    return values.std(0, ddof=1) / count**0.5 if count > 1 else np.zeros(values.shape[1:])


def write_report(config: AttentionConfig, results: Mapping[str, Any]) -> None:
    """attention.json and figures, where --save asks for them."""
    if not config.save:
        return
    folder = own_folder(config.save)
    folder.claim()
    draw(results, folder.path / "figures")
    write_text(folder.path / RESULTS, json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def draw(results: Mapping[str, Any], figures: Path) -> None:
    """Every figure."""
    models = {name: {key: np.array(found[key]) for key in TITLES} for name, found in results["models"].items()}
    base, *students = models
    for key, (title, unit) in TITLES.items():
        plot_heat_maps({name: found[key] for name, found in models.items()}, figures / f"{key}.png", title=title, unit=unit)
        changes = {f"{name} − {base}": models[name][key] - models[base][key] for name in students}
        if changes:
            plot_heat_maps(changes, figures / f"{key}_change.png", title=f"change of {title}", unit=unit, around_zero=True)
    by_layer = {title: (unit, {name: found[key].mean(1) for name, found in models.items()}) for key, (title, unit) in TITLES.items()}
    plot_by_layer(by_layer, figures / "comparison.png")


def print_report(results: Mapping[str, Any]) -> None:
    """A line a model; below it, for each student, the heads whose mass on numbers rose most."""
    width = max(map(len, results["models"]))
    print(f"{results['questions']} questions, {results['number_tokens']:.1f} number tokens each")
    print(f"{'':{width}}  {'entropy, nats':>14}  {'mass on numbers':>15}")
    for name, found in results["models"].items():
        print(f"{name:{width}}  {found['mean_entropy']:14.4f}  {found['mean_number_mass']:15.4f}")
    base = next(iter(results["models"]))
    for name, found in results["changes"].items():
        print(f"\n{name} − {base}: entropy {signed(found['entropy'])}, mass on numbers {signed(found['number_mass'])}")
        for head in found["heads"]:
            moved = f"{head['base']:.4f} -> {head['student']:.4f} ({head['change']:+.4f} ± {head['sem']:.4f})"
            print(f"  layer {head['layer']} head {head['head']}: {moved}")


def signed(change: Mapping[str, float]) -> str:
    """A change and the error of its mean."""
    return f"{change['mean']:+.4f} ± {change['sem']:.4f}"
