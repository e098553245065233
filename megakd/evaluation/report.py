"""What an evaluation leaves behind.

    results.json         settings, versions, numbers by set and by seed, curves of exposure bias
    answers.jsonl        one line a set, seed and sample: prompt, answer, references, scores, token ids
    exposure_bias.jsonl  one line a set, writer, seed and sample: token ids, and KL(p‖q) at every token of the response
    figures/             Rouge-L by set, exposure bias by length, each with its numbers as .csv
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megakd.config import EvaluateConfig
from megakd.data.batch import Sample
from megakd.errors import UserError, file_errors
from megakd.evaluation.evaluation_set import EvaluationSet
from megakd.reporting.jsonl import dump, finite
from megakd.reporting.own_folder import OwnFolder, hidden, write_text
from megakd.reporting.plots import plot_comparison, plot_exposure_bias

COLUMNS = {  # in results["sets"]: heading, format
    "samples": ("samples", "{:d}"),
    "rouge_l": ("Rouge-L", "{:.2f}"),
    "exact_match": ("exact match", "{:.2f}"),
    "gsm8k_robust": ("robust", "{:.2f}"),
    "gsm8k_strict": ("strict", "{:.2f}"),
    "gsm8k_flexible": ("flexible", "{:.2f}"),
    "response_length": ("tokens", "{:.1f}"),
    "lm_loss": ("LM loss", "{:.4f}"),
    "reverse_kl": ("KL(q‖p)", "{:.4f}"),
    "reverse_kl_bias": ("or more by", "{:.4f}"),
    "forward_kl": ("KL(p‖q)", "{:.4f}"),
    "forward_kl_bias": ("or more by", "{:.4f}"),
    "ex_acc_err": ("ExAccErr", "{:.2f}"),
}
MOST_UNSEEN_LETTERS = 10  # per cent; a few accents change little

RESULTS = "results.json"
FILES = ("answers.jsonl", "exposure_bias.jsonl")
CURVES = ("figures/exposure_bias.png", "figures/exposure_bias.csv")


def own_folder(save: str) -> OwnFolder:
    """What --save of evaluate.py names."""
    return OwnFolder(Path(save), "evaluate.py")


def check_folder(config: EvaluateConfig) -> None:
    """An evaluation goes into a new folder, or where one was cut off; over a finished one with --overwrite alone.

    Raises:
        UserError: it is somebody else's folder, or holds results, or cannot be written.
    """
    if not config.save:
        return
    own_folder(config.save).check(is_older=is_evaluation)
    if (Path(config.save) / RESULTS).is_file() and not config.overwrite:
        raise UserError(f"--save {config.save} holds the results of an evaluation; give another folder, or --overwrite to replace them")


def is_evaluation(folder: Path) -> bool:
    """Of a version that wrote no marker: by what its results.json begins with."""
    file = folder / RESULTS
    return file.is_file() and file.read_text(encoding="utf-8", errors="replace").startswith('{\n  "config": {\n    "model":')


class Report:
    """Writes into `folder`; into none where it is empty, as on every rank but one.

    Files get their names when all is done: an evaluation that is cut off leaves the one before it whole.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder) if folder else None
        self._files: dict[str, Any] = {}

    def add_answers(
        self, data: EvaluationSet, seed: int, answers: Sequence[str], responses: Sequence[Sequence[int]], scores: Sequence[dict]
    ) -> None:
        """One pass over one set."""
        for i, (answer, tokens, row) in enumerate(zip(answers, responses, scores)):
            where = {"set": data.name, "seed": seed, "sample_id": i, "prompt": data.prompt_text(i)}
            what = {"answer": answer, "references": data.references(i), "scores": row, "response_ids": tokens}
            self._append("answers.jsonl", where | what)

    def add_divergences(
        self, data: EvaluationSet, writer: str, seed: int, samples: Sequence[Sample], rows: Sequence[np.ndarray]
    ) -> None:
        """What one model drew once for one set."""
        for sample, row in zip(samples, rows):
            where = {"set": data.name, "writer": writer, "seed": seed, "sample_id": sample.sample_id}
            ids = {"prompt_ids": sample.prompt, "response_ids": sample.response}
            self._append("exposure_bias.jsonl", where | ids | {"kl": row.tolist()})

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        if self.folder is None:
            return
        if not self._files:
            own_folder(str(self.folder)).claim()
        with file_errors(self.folder / name):
            if name not in self._files:
                self._files[name] = hidden(self.folder / name).open("w", encoding="utf-8")
            self._files[name].write(dump(row))

    def finish(self, results: Mapping[str, Any]) -> None:
        """results.json and the figures, in the place of what an earlier evaluation left."""
        if self.folder is None:
            return
        with file_errors(self.folder):
            for file in self._files.values():
                file.close()
            for name in self._files:
                os.replace(hidden(self.folder / name), self.folder / name)
            for name in {*FILES, *CURVES} - self._files.keys():
                (self.folder / name).unlink(missing_ok=True)
        write_text(self.folder / RESULTS, json.dumps(finite(results), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        plot_comparison(results["sets"], {"rouge_l": "F-measure × 100"}, self.folder / "figures" / "rouge_l.png")
        if results["exposure_bias"]:
            plot_exposure_bias(results["exposure_bias"], self.folder / "figures" / "exposure_bias.png")


def notes(results: Mapping[str, Any]) -> list[str]:
    """What a reader of the numbers has to know: the rules that made them, and what they do not see."""
    config = results["config"]
    rules = {"exact match": "exact_match_rule", **({"GSM8K": "gsm8k_rule"} if "gsm8k" in results["sets"] else {})}
    said = [f"{title} by the rule {config[name]}" for title, name in rules.items()]
    lines = [", ".join([*said, f"Rouge-L with the tokenizer {' '.join(config['rouge_tokenizer'])}"])]
    return lines + [f"{name}: {line}" for name, numbers in results["sets"].items() for line in blind_spots(numbers)]


def blind_spots(numbers: Mapping[str, float]) -> Iterator[str]:
    """Of one set."""
    rows, letters = numbers["rouge_l_unseen_rows"], numbers["rouge_l_unseen_letters"]
    if rows or letters > MOST_UNSEEN_LETTERS:
        yield (
            f"Rouge-L is 0 for the right answer itself in {rows} of {numbers['samples']} rows and does not see {letters:.0f} % of the "
            "letters; --rouge-tokenizer unicode does"
        )
    if hidden := numbers["hidden_tokens"]:
        yield f"{hidden:.2g} tokens an answer are special ones that its text does not show; answers.jsonl has them in response_ids"
    if lost := [name for name, value in numbers.items() if isinstance(value, float) and not math.isfinite(value)]:
        yield f"{', '.join(lost)}: not a number, null in results.json; look for NaN in the weights, or use --dtype fp32"


def print_table(results: Mapping[str, Any]) -> None:
    """One line a set, mean ± standard deviation over seeds; below it the notes."""
    sets = results["sets"]
    names = [name for name in COLUMNS if any(name in numbers for numbers in sets.values())]
    lines = [["", *(COLUMNS[name][0] for name in names)]]
    lines += [[title, *(cell(numbers, name) for name in names)] for title, numbers in sets.items()]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join([line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:]))]))
    for note in results["notes"]:
        print(note)


def cell(numbers: Mapping[str, float], name: str) -> str:
    """`25.13 ± 0.21`, or less where there is less."""
    if numbers.get(name) is None:
        return "-"
    value, deviation = numbers[name], numbers.get(f"{name}_sd")
    form = COLUMNS[name][1]
    return form.format(value) if deviation is None else f"{form} ± {form}".format(value, deviation)
