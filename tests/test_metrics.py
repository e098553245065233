"""Rouge-L and exact match are those of the papers, checked on Google's recorded values."""

import json
import os
from pathlib import Path

import pytest
from rouge_score.rouge_scorer import RougeScorer

from megakd.evaluation.metrics import exact_match, rouge_l

DATA = Path(os.environ.get("MEGAKD_TEST_DATA", Path(__file__).parents[1].parent / "shared" / "data"))
ROUGE = DATA / "recorded" / "rouge-testdata"
SINST = DATA / "minillm" / "sinst" / "11_" / "valid.jsonl"
needs_rouge = pytest.mark.skipif(not ROUGE.is_dir(), reason=f"no recorded Rouge values at {ROUGE}; set MEGAKD_TEST_DATA")
needs_sinst = pytest.mark.skipif(not SINST.is_file(), reason=f"no S-NI test set at {SINST}; set MEGAKD_TEST_DATA")


def mean_rouge_l(predictions, references):
    return sum(map(rouge_l, predictions, references)) / len(predictions)


@needs_rouge
def test_rouge_l_gives_googles_recorded_values():
    expected = json.loads((ROUGE / "expected.json").read_text())
    predictions, targets = ((ROUGE / f"{name}_large.txt").read_text().splitlines() for name in ("prediction", "target"))
    references = [[target] for target in targets]
    mean = expected["plain_means_rouge_score_0.1.2"]["stem_true"]["rougeL"][2]
    published = next(case for case in expected["large_files_bootstrap_mid"]["cases"] if case["type"] == "rougeL")
    assert len(predictions) == 1000
    assert mean_rouge_l(predictions, references) == pytest.approx(100 * mean, abs=6e-4)  # recorded to five digits
    assert mean_rouge_l(predictions, references) == pytest.approx(100 * published["f"][1], abs=0.2)  # a bootstrap's median
    for case in expected["inline"]:
        if case["type"] == "rougeL":
            assert rouge_l(case["prediction"], [case["target"]]) == pytest.approx(100 * case["f"])


@needs_sinst
def test_rouge_l_takes_the_best_reference_on_the_s_ni_set():
    references = [json.loads(line)["output"] for line in SINST.read_text().split("\n") if line]
    predictions = [references[i - 1][0] for i in range(len(references))]  # the answer to the question before
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    best = [
        max(scorer.score(target, prediction)["rougeL"].fmeasure for target in targets)
        for prediction, targets in zip(predictions, references)
    ]
    first = [scorer.score(targets[0], prediction)["rougeL"].fmeasure for prediction, targets in zip(predictions, references)]
    assert mean_rouge_l(predictions, references) == pytest.approx(100 * sum(best) / len(best))
    assert sum(best) > sum(first)


def test_the_stemmer_is_on_and_the_best_reference_counts():
    assert rouge_l("running", ["runs"]) == 100
    assert rouge_l("a b", ["x y", "a b"]) == 100 and rouge_l("c", ["d"]) == 0


@pytest.mark.parametrize(
    ("prediction", "targets", "score"),
    [
        ("The  Cat,\nsat.", ["the cat sat"], 100),
        ("a cat", ["cat"], 0),  # articles count
        ("cold", ["warm", "Cold!"], 100),
        ("", ["..."], 100),
        ("1 2", ["12"], 0),
    ],
)
def test_exact_match_ignores_case_punctuation_and_spacing_only(prediction, targets, score):
    assert exact_match(prediction, targets) == score
