"""Rouge-L and exact match are those of the papers, checked on Google's recorded values."""

import json
import os
from pathlib import Path

import pytest
from rouge_score.rouge_scorer import RougeScorer

from megakd.evaluation.metrics import STEMMED, UNICODE, exact_match, is_unseen, rouge_l, unseen_letters

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
def test_exact_match_of_the_papers_ignores_case_punctuation_and_spacing_only(prediction, targets, score):
    assert exact_match(prediction, targets, "papers") == score


@pytest.mark.parametrize(
    ("prediction", "target", "strict", "papers"),
    [
        ("3.5", "35", 0, 100),
        ("<", ">", 0, 100),
        ("-4", "4", 0, 100),
        ("C++", "C", 0, 100),
        ("", "...", 0, 100),
        ("cat, sat", "cat sat", 0, 100),
        ("  Cold\n water.", "cold water", 100, 100),
        ("7.", "7", 100, 100),
        ("ΣΑΣ", "σας", 100, 100),
        ("e\u0301te\u0301", "\u00e9t\u00e9", 100, 0),  # one letter, written in two ways
    ],
)
def test_exact_match_takes_no_number_or_sign_for_another_unless_the_papers_do(prediction, target, strict, papers):
    assert exact_match(prediction, [target]) == exact_match(target, [prediction]) == strict
    assert exact_match(prediction, [target], "papers") == papers


@pytest.mark.parametrize(
    ("text", "half"),
    [
        ("на дворе трава, на траве дрова", "на дворе трава"),
        ("苹果很好吃", "苹果很"),
        ("مرحبا بالعالم كله", "مرحبا بالعالم"),
        ("हिन्दी भाषा है", "हिन्दी भाषा"),
        ("ภาษาไทย", "ภาษา"),
        ("<=>", "<="),
    ],
)
def test_rouge_l_sees_every_script_with_the_unicode_tokenizer(text, half):
    assert rouge_l(text, [text]) == 0 and is_unseen([text], STEMMED)  # the papers' tokenizer
    assert rouge_l(text, [text], UNICODE) == 100 and not is_unseen([text], UNICODE)
    assert 0 < rouge_l(half, [text], UNICODE) < 100
    assert rouge_l("something else", [text], UNICODE) == 0


def test_words_keep_their_accents_and_vowel_signs_and_unspaced_scripts_are_read_by_the_character():
    assert UNICODE.tokenize("Naïve cafés, running") == ["naïve", "cafés", "run"]
    assert UNICODE.tokenize("हिन्दी") == ["हिन्दी"] and UNICODE.tokenize("कि") != UNICODE.tokenize("का")
    assert UNICODE.tokenize("苹果 iPhone15 很好") == ["苹", "果", "iphone15", "很", "好"]


@needs_sinst
def test_the_unicode_tokenizer_changes_nothing_in_ascii_text():
    texts = [text for line in SINST.read_text().split("\n") if line for text in json.loads(line)["output"]]
    texts = [text for text in texts if text.isascii() and STEMMED.tokenize(text)]
    assert len(texts) > 2000 and all(UNICODE.tokenize(text) == STEMMED.tokenize(text) for text in texts)


def test_letters_that_are_not_seen_are_counted():
    assert unseen_letters(["ab", "вг 12"], STEMMED) == 2 / 6 and unseen_letters(["вг"], UNICODE) == 0
    assert not is_unseen(["", " "], STEMMED)  # nothing is there to be seen
    assert not is_unseen(["вг", "b"], STEMMED)
