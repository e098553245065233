"""Scores, losses and exposure bias equal float64 transformers and themselves at every layout; what was interrupted continues."""

from __future__ import annotations

import copy
import json
import math
import subprocess
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import run_distributed
from tasks import make_rows
from tiny import tiny_config, tiny_model
from train_tokenizer import train_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from megakd.config import EvaluateConfig, GenerateConfig, LayoutConfig, ResponseConfig, ScoreConfig, TeacherLayoutConfig, parse
from megakd.data.sft_dataset import SFTDataset
from megakd.data.tokenizer import load_tokenizer
from megakd.evaluation import metrics
from megakd.evaluation.evaluation_set import EvaluationSet, named_paths
from megakd.evaluation.evaluator import evaluate
from megakd.evaluation.exposure_bias import accumulated, exposure_bias
from megakd.evaluation.report import Report, notes
from megakd.generation.answers import hidden_ids
from megakd.generation.generate import generate
from megakd.generation.sampling import Sampling
from megakd.generation.write_responses import ResponseFile, write_responses
from megakd.loading import ModelFolders, frozen

ROOT = Path(__file__).parents[1]
RESPONSES = ResponseConfig(max_prompt_length=24, max_new_tokens=12, batch_size=2)
SEEDS = (10, 20)
EOS = 0  # of the tokenizer, and of both configs
LAYOUTS = [
    pytest.param(2, 1, 1, id="TP2"),
    pytest.param(1, 2, 1, id="PP2"),
    pytest.param(1, 1, 2, id="DP2, 4 rows and 3"),
    pytest.param(2, 1, 2, id="TP2 DP2"),
]


@pytest.fixture(scope="session")
def lab(tmp_path_factory) -> Path:
    """student/ and teacher/ with one tokenizer but embeddings of unequal size, tasks.jsonl and gsm8k.jsonl."""
    lab = tmp_path_factory.mktemp("lab")
    rows = make_rows(60, seed=3)
    tokenizer = train_tokenizer([row["prompt"] + row["response"] for row in rows])
    specials = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"student": {"layers": 2}, "teacher": {"layers": 4, "hidden": 96}}
    for unused, (name, size) in zip((0, 5), sizes.items()):
        config = tiny_config("gpt2", vocab_size=len(tokenizer) + unused, **size, **specials)
        tiny_model(config, seed=unused).save_pretrained(lab / name)
        tokenizer.save_pretrained(lab / name)
    tasks = [{"prompt": row["prompt"], "output": [row["response"].strip(), "cold"], "task": row["task"]} for row in rows[:7]]
    write(lab / "tasks.jsonl", tasks)
    write(lab / "gsm8k.jsonl", [{"prompt": row["prompt"], "answer": "so\n#### 1,000"} for row in rows[7:10]])
    return lab


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def evaluation(lab: Path, save: Path, **changes) -> EvaluateConfig:
    folders = {"model": str(lab / "student"), "teacher_model": str(lab / "teacher"), "save": str(save), "dtype": "fp32"}
    data = {"data": (f"tasks={lab / 'tasks.jsonl'}",), "gsm8k": str(lab / "gsm8k.jsonl"), "seeds": SEEDS}
    return EvaluateConfig(**{**folders, **data, "responses": RESPONSES, "exposure_bias": True, "micro_batch_size": 2, **changes})


def on_rank(layout, run, config):
    return run(config)


def on_ranks(run, config, *, tp: int = 1, pp: int = 1, dp: int = 1) -> list:
    parallel = LayoutConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    return run_distributed(on_rank, tp * pp * dp, run, replace(config, parallel=parallel), tp=tp, pp=pp)


@pytest.fixture(scope="session")
def one_rank(lab, tmp_path_factory) -> tuple[dict, Path]:
    """Results of one rank, and the folder it wrote."""
    save = tmp_path_factory.mktemp("one_rank")
    return on_ranks(evaluate, evaluation(lab, save))[0], save


def numbers(results: dict) -> dict[str, float]:
    return {f"{data}/{name}": value for data, row in results["sets"].items() for name, value in row.items()}


@pytest.mark.parametrize("tp, pp, dp", LAYOUTS)
def test_every_layout_gives_the_same_answers_and_numbers_on_every_rank(lab, one_rank, tmp_path, tp, pp, dp):
    results, save = one_rank
    ranks = on_ranks(evaluate, evaluation(lab, tmp_path), tp=tp, pp=pp, dp=dp)
    for rank in ranks:
        assert numbers(rank) == pytest.approx(numbers(results), rel=1e-5, abs=1e-3)  # ExAccErr is a small difference, in per cent
        for name, curve in results["exposure_bias"]["tasks"].items():
            assert rank["exposure_bias"]["tasks"][name] == pytest.approx(curve, rel=1e-4, abs=1e-3)
    assert (tmp_path / "answers.jsonl").read_bytes() == (save / "answers.jsonl").read_bytes()
    assert len(read(save / "answers.jsonl")) == len(SEEDS) * 10


def test_a_teacher_in_its_own_layout_is_as_far_away(lab, one_rank, tmp_path):
    apart = TeacherLayoutConfig(teacher_tensor_model_parallel_size=2)
    ranks = on_ranks(evaluate, evaluation(lab, tmp_path, exposure_bias=False, teacher_layout=apart, gsm8k=""), dp=2)
    expected = {name: value for name, value in numbers(one_rank[0]).items() if name.startswith("tasks") and "ex_acc_err" not in name}
    for rank in ranks:
        assert numbers(rank) == pytest.approx(expected, rel=1e-5)


# ---- against float64 transformers


def log_probs(lab: Path, name: str, prompt, response) -> torch.Tensor:
    """[len(response), V] in float64: one row, no padding, the ids that both models have."""
    model = AutoModelForCausalLM.from_pretrained(lab / name, dtype=torch.float64).eval()
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    return logits[:, : len(AutoTokenizer.from_pretrained(lab / name))].log_softmax(-1)


def test_held_out_losses_are_those_of_transformers_in_float64(lab, one_rank):
    tokenizer = load_tokenizer(lab / "student")
    nll = reverse = forward = tokens = 0.0
    for row in read(lab / "tasks.jsonl"):
        prompt = tokenizer(row["prompt"])["input_ids"]
        response = [*tokenizer(row["prompt"] + row["output"][0])["input_ids"][len(prompt) :], tokenizer.eos_token_id]
        q, p = (log_probs(lab, name, prompt, response) for name in ("student", "teacher"))
        nll -= float(q.gather(1, torch.tensor(response)[:, None]).sum())
        reverse += float((q.exp() * (q - p)).sum())
        forward += float((p.exp() * (p - q)).sum())
        tokens += len(response)
    got = one_rank[0]["sets"]["tasks"]
    want = {"lm_loss": nll / tokens, "reverse_kl": reverse / tokens, "forward_kl": forward / tokens, "tokens": tokens}
    assert {name: got[name] for name in want} == pytest.approx(want, rel=1e-6)


def test_exposure_bias_is_recomputed_in_float64_from_saved_answers(lab, one_rank):
    results, save = one_rank
    curves: dict[str, list[list[float]]] = {"student": [], "teacher": []}
    for row in read(save / "exposure_bias.jsonl"):
        if row["set"] != "tasks":
            continue
        q, p = (log_probs(lab, name, row["prompt_ids"], row["response_ids"]) for name in ("student", "teacher"))
        kl = (p.exp() * (p - q)).sum(-1).tolist()
        assert row["kl"] == pytest.approx(kl, rel=1e-5, abs=1e-6)
        curves[row["writer"]].append([sum(kl[: length + 1]) for length in range(RESPONSES.max_new_tokens)])
    n = len(curves["student"])
    got = results["exposure_bias"]["tasks"]
    for i in range(RESPONSES.max_new_tokens):
        own, teachers = ([curve[i] for curve in curves[writer]] for writer in ("student", "teacher"))
        regret, epsilon = sum(own) / n, sum(teachers) / n
        sd = (sum((value - regret) ** 2 for value in own) / (n - 1)) ** 0.5
        assert got["R"][i] == pytest.approx(regret, rel=1e-5)
        assert got["l_eps"][i] == pytest.approx(epsilon, rel=1e-5)
        assert (got["R_sd"][i], got["R_sem"][i]) == pytest.approx((sd, sd / n**0.5), rel=1e-4)
        assert got["ex_acc_err"][i] == pytest.approx(100 * (regret - epsilon) / epsilon, rel=1e-3, abs=1e-3)
    assert results["sets"]["tasks"]["ex_acc_err"] == got["ex_acc_err"][-1]


def test_a_model_has_no_exposure_bias_against_itself(lab, tmp_path):
    config = evaluation(lab, tmp_path, teacher_model=str(lab / "student"), gsm8k="", exposure_bias_samples=2)
    results = on_ranks(evaluate, config)[0]
    curves = results["exposure_bias"]["tasks"]
    assert set(curves["R"]) == set(curves["l_eps"]) == set(curves["ex_acc_err"]) == set(curves["ex_acc_err_sem"]) == {0.0}
    assert results["sets"]["tasks"]["reverse_kl"] == results["sets"]["tasks"]["forward_kl"] == 0


def test_a_response_that_has_ended_adds_nothing_and_samples_are_averaged():
    rows = [np.array([1.0, 2.0]), np.array([3.0, 0.0, 1.0, 5.0])]
    assert accumulated(rows, 4).tolist() == [2.0, 3.0, 3.5, 6.0]
    assert accumulated(rows, 3, skip_first=True).tolist() == [1.0, 1.5, 4.0]
    assert accumulated([np.array([1.0])], 2, skip_first=True).tolist() == [0.0, 0.0]


def test_exposure_bias_has_the_spread_of_its_ratio_and_none_where_it_is_undefined():
    own, teachers = np.array([[0.0, 1e-3, 3.0], [0.0, 1e-3, 5.0]]), np.array([[0.0, 0.0, 1.0], [0.0, 0.0, 3.0]])
    curves = exposure_bias(own, teachers)
    assert curves["ex_acc_err"] == [0.0, None, 100.0]
    assert curves["ex_acc_err_sd"][2] == pytest.approx(100 * np.std([3 - 2 * 1, 5 - 2 * 3], ddof=1) / 2)
    proportional = exposure_bias(3 * teachers, teachers)  # every prompt has the same ratio: it is known exactly
    assert (proportional["ex_acc_err"][2], proportional["ex_acc_err_sem"][2]) == (200.0, 0.0)
    assert exposure_bias(own[:1], teachers[:1])["R_sd"] == [None] * 3


# ---- answers and their scores


def test_scores_are_those_of_the_saved_answers(one_rank):
    results, save = one_rank
    ended: set[int] = set()
    for seed in SEEDS:
        rows = [row for row in read(save / "answers.jsonl") if (row["set"], row["seed"]) == ("tasks", seed)]
        got = results["seeds"]["tasks"][str(seed)]
        assert got["rouge_l"] == pytest.approx(np.mean([metrics.rouge_l(row["answer"], row["references"]) for row in rows]))
        assert got["exact_match"] == pytest.approx(np.mean([metrics.exact_match(row["answer"], row["references"], "strict") for row in rows]))
        assert [row["sample_id"] for row in rows] == list(range(7))
        lengths = [len(row["response_ids"]) - (EOS in row["response_ids"]) for row in rows]
        assert got["response_length"] == pytest.approx(np.mean(lengths))
        ended |= {len(row["response_ids"]) for row in rows if EOS in row["response_ids"]}
    seeds = [results["seeds"]["tasks"][str(seed)]["response_length"] for seed in SEEDS]
    assert results["sets"]["tasks"]["response_length"] == pytest.approx(np.mean(seeds))
    assert results["sets"]["tasks"]["response_length_sd"] == pytest.approx(np.std(seeds, ddof=1))
    assert ended and max(ended) < RESPONSES.max_new_tokens
    assert "gsm8k_robust" in results["sets"]["gsm8k"]


def test_an_evaluation_leaves_results_answers_and_figures(one_rank):
    results, save = one_rank
    assert json.loads((save / "results.json").read_text()) == json.loads(json.dumps(results))
    assert {"config", "versions", "layout", "device"} < results.keys()
    for figure in ("rouge_l", "exposure_bias"):
        assert {(save / "figures" / f"{figure}{suffix}").is_file() for suffix in (".png", ".csv")} == {True}


def test_greedy_answers_once_and_an_n_gram_can_be_kept_from_repeating(lab, tmp_path):
    repeated = {}
    for size in (0, 2):
        responses = replace(RESPONSES, greedy=True, no_repeat_ngram_size=size)
        config = evaluation(lab, tmp_path / str(size), responses=responses, teacher_model="", gsm8k="", exposure_bias=False)
        results = on_ranks(evaluate, config)[0]
        rows = read(tmp_path / str(size) / "answers.jsonl")
        repeated[size] = sum(len(row["response_ids"]) - 1 - len(set(pairwise(row["response_ids"]))) for row in rows)
        assert len(rows) == 7
        assert "rouge_l_sd" not in results["sets"]["tasks"] and "reverse_kl" not in results["sets"]["tasks"]
    assert repeated[0] > 0 == repeated[2]


def test_bos_stands_before_prompts_only_where_it_is_asked_for(data_folder, tmp_path):
    tokenizer = load_tokenizer(data_folder / "models" / "stories260K")
    write(tmp_path / "data.jsonl", [{"prompt": "Once upon", "response": "a time"}])
    options = {"max_prompt_length": 16, "max_response_length": 16}
    plain, with_bos = (EvaluationSet("s", tmp_path / "data.jsonl", tokenizer, **options, add_bos=bos)[0] for bos in (False, True))
    assert with_bos.prompt == (tokenizer.bos_token_id, *plain.prompt)
    assert with_bos.response == plain.response


# ---- generate.py


def generation(lab: Path, save: Path, **changes) -> GenerateConfig:
    settings = {"model": str(lab / "student"), "data": str(lab / "tasks.jsonl"), "dtype": "fp32", "token_ids": True}
    return GenerateConfig(**{**settings, "save": str(save), "responses": replace(RESPONSES, batch_size=1), **changes})


def test_an_interrupted_file_continues_to_the_bytes_of_an_unbroken_run(lab, tmp_path):
    on_ranks(write_responses, generation(lab, tmp_path / "whole.jsonl"))
    whole = (tmp_path / "whole.jsonl").read_bytes()
    broken = tmp_path / "broken.jsonl"
    on_ranks(write_responses, generation(lab, broken))
    for length in (len(whole) * 3 // 4, 10, len(whole)):
        broken.write_bytes(whole[:length])
        on_ranks(write_responses, generation(lab, broken))
        assert broken.read_bytes() == whole
    on_ranks(write_responses, generation(lab, tmp_path / "two.jsonl"), dp=2)
    assert (tmp_path / "two.jsonl").read_bytes() == whole


def test_generated_rows_keep_their_fields_and_are_training_data_as_they_stand(lab, tmp_path):
    write(tmp_path / "in.jsonl", [{"prompt": "Copy: a b c d\nAnswer:", "response": " a b c d", "task": "copy"}])
    on_ranks(write_responses, generation(lab, tmp_path / "out.jsonl", data=str(tmp_path / "in.jsonl")))
    (row,) = read(tmp_path / "out.jsonl")
    assert (row["prompt"], row["reference"], row["task"]) == ("Copy: a b c d\nAnswer:", " a b c d", "copy")
    tokenizer = load_tokenizer(lab / "student")
    sample = SFTDataset(tmp_path / "out.jsonl", tokenizer, max_length=200, max_prompt_length=24)[0]
    assert list(sample.prompt) == row["prompt_ids"]
    assert list(sample.response) == row["response_ids"]  # cut off by --max-new-tokens, so without EOS


def test_a_file_is_not_continued_with_other_settings(lab, tmp_path):
    on_ranks(write_responses, generation(lab, tmp_path / "out.jsonl"))
    with pytest.raises(ValueError, match=r"--seed 5 differs from the 1234 that --save .* was begun with; give the same command"):
        write_responses(generation(lab, tmp_path / "out.jsonl", seed=5))
    (tmp_path / "out.jsonl.config.yaml").unlink()
    with pytest.raises(ValueError, match=r"no out.jsonl.config.yaml says how it was made; name another file"):
        write_responses(generation(lab, tmp_path / "out.jsonl"))


def test_a_file_cut_off_while_its_settings_are_written_keeps_the_old_ones(lab, tmp_path, monkeypatch):
    def half(file, text, **options):
        file.open("w").write(text[: len(text) // 2])
        raise KeyboardInterrupt

    on_ranks(write_responses, generation(lab, tmp_path / "out.jsonl"))
    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(KeyboardInterrupt):
        ResponseFile(generation(lab, tmp_path / "out.jsonl")).continue_at(1, 1)
    ResponseFile(generation(lab, tmp_path / "out.jsonl"))  # which reads them


# ---- errors and commands


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ""}, "--model is missing; give a Hugging Face folder"),
        ({"model": "nowhere"}, "--model nowhere: no such folder"),
        ({"data": (), "gsm8k": ""}, "--data is missing; give jsonl files"),
        ({"data": ("nowhere.jsonl",)}, "nowhere.jsonl: no such data file"),
        ({"data": ("a/valid.jsonl", "b/valid.jsonl")}, "both are named valid; name one, as in first=a/valid.jsonl"),
        ({"seeds": ()}, "--seeds is empty; give one number or more"),
        ({"seeds": (3, 5, 3)}, "--seeds names 3 more than once, .*; name each seed once"),
        ({"teacher_model": ""}, "--exposure-bias needs --teacher-model"),
        (
            {"teacher_layout": TeacherLayoutConfig(teacher_pipeline_model_parallel_size=2)},
            "--exposure-bias asks both models in one layout; leave it out, or --teacher-pipeline-model-parallel-size 2",
        ),
        ({"exposure_bias_samples": 3}, "--exposure-bias-samples 3 is more than the 2 --seeds"),
        ({"responses": replace(RESPONSES, max_new_tokens=50)}, r"24 \+ --max-new-tokens 50 is more than the 64 positions"),
        ({"parallel": LayoutConfig(tensor_model_parallel_size=2)}, "does not divide the 1 rank"),
        ({"gsm8k": "TASKS"}, "has no number after ####; --gsm8k needs answers that end in"),
    ],
)
def test_errors_are_one_line_with_the_flag_and_the_way_out(lab, tmp_path, changes, message):
    changes = {name: str(lab / "tasks.jsonl") if value == "TASKS" else value for name, value in changes.items()}
    with pytest.raises(ValueError, match=message) as error:
        evaluate(evaluation(lab, tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_data_sets_are_named_or_named_after_their_files():
    assert [(named.name, named.path) for named in named_paths(["dolly=a/valid.jsonl", "b/vicuna.jsonl"])] == [
        ("dolly", "a/valid.jsonl"),
        ("vicuna", "b/vicuna.jsonl"),
    ]


def test_flags_and_yaml_lists_reach_the_configuration(tmp_path):
    (tmp_path / "evaluate.yaml").write_text("model: m\nseeds: [1, 2]\ndata: [a=b.jsonl]\n")
    config = parse(["--config", str(tmp_path / "evaluate.yaml"), "--tp", "2", "--greedy"], EvaluateConfig, program="evaluate.py")
    assert (config.seeds, config.data, config.parallel.tensor_model_parallel_size) == ((1, 2), ("a=b.jsonl",), 2)
    assert config.responses.greedy


def test_the_command_prints_a_table_and_a_mistake_is_one_line(lab, python):
    script = [python, str(ROOT / "scripts" / "evaluate.py")]
    flags = f"--model {lab}/student --data {lab}/tasks.jsonl --seeds 1 2 --max-prompt-length 24 --max-new-tokens 4".split()
    done = subprocess.run([*script, *flags], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "Rouge-L" in done.stdout and "±" in done.stdout and "ETA" in done.stdout
    failed = subprocess.run([*script, "--model", "m"], capture_output=True, text=True, cwd=ROOT)
    message = "error: --data is missing; give jsonl files with prompt and response, or --gsm8k\n"
    assert (failed.returncode, failed.stderr) == (2, message)


# ---- what numbers do not say


def test_rules_and_tokenizers_are_chosen_by_name_and_told(lab, tmp_path, capfd):
    write(tmp_path / "ru.jsonl", [{"prompt": "Copy: a b\nAnswer:", "response": "привет"}])
    write(tmp_path / "en.jsonl", [{"prompt": "Copy: a b\nAnswer:", "response": "hello"}])
    files = (f"ru={tmp_path}/ru.jsonl", f"en={tmp_path}/en.jsonl")
    shared = {"data": files, "seeds": (1,), "teacher_model": "", "exposure_bias": False}
    results = on_ranks(evaluate, evaluation(lab, tmp_path / "default", **shared))[0]
    blind = "ru: Rouge-L is 0 for the right answer itself in 1 of 1 rows and does not see 100 % of the letters; --rouge-tokenizer unicode does"
    rules = "exact match by the rule strict, GSM8K by the rule robust, Rouge-L with the tokenizer default"
    assert results["notes"] == [rules, blind]
    assert json.loads((tmp_path / "default" / "results.json").read_text())["notes"] == [rules, blind]
    assert f"{rules}\n{blind}\n" in capfd.readouterr().out

    chosen = ScoreConfig(exact_match_rule="papers", gsm8k_rule="papers", rouge_tokenizer=("ru=unicode", "model"))
    results = on_ranks(evaluate, evaluation(lab, tmp_path / "chosen", **shared, scores=chosen))[0]
    rules = "exact match by the rule papers, GSM8K by the rule papers, Rouge-L with the tokenizer ru=unicode model"
    assert results["notes"] == [rules]
    assert {"gsm8k_strict", "gsm8k_flexible"} < results["sets"]["gsm8k"].keys()
    tokenizer = load_tokenizer(lab / "student")
    options = {"max_prompt_length": 24, "max_response_length": 12, "scores": chosen}
    ru, en = (EvaluationSet(name, tmp_path / f"{name}.jsonl", tokenizer, **options) for name in ("ru", "en"))
    assert ru.score(0, "Привет")["rouge_l"] == 100 > ru.score(0, "пока")["rouge_l"] == 0
    assert 0 < en.score(0, "hell")["rouge_l"] < 100  # pieces of words are tokens of the model


def test_an_unknown_tokenizer_or_set_is_refused(lab, tmp_path):
    with pytest.raises(ValueError, match="--rouge-tokenizer tasks=unicod: use one of default, unicode, model, for one data set as in"):
        evaluate(evaluation(lab, tmp_path, scores=ScoreConfig(rouge_tokenizer=("tasks=unicod",))))
    with pytest.raises(ValueError, match=r"--rouge-tokenizer task=\.\.\.: no data set has this name; there are gsm8k, tasks"):
        evaluate(evaluation(lab, tmp_path, scores=ScoreConfig(rouge_tokenizer=("task=unicode",))))


@pytest.fixture(scope="module")
def nan_folder(lab, tmp_path_factory) -> Path:
    """The student with a last norm that overflows: its weights are numbers, its logits are none."""
    folder = tmp_path_factory.mktemp("nan")
    model = AutoModelForCausalLM.from_pretrained(lab / "student")
    model.transformer.ln_f.weight.data[:] = torch.finfo(torch.float32).max
    model.save_pretrained(folder)
    load_tokenizer(lab / "student").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tp, pp", [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("sampling", [{}, {"greedy": True}, {"top_k": 3}, {"top_p": 0.9}])
def test_logits_that_are_no_numbers_choose_no_token(lab, nan_folder, tp, pp, sampling):
    def write_one(layout):
        (model,) = map(frozen, ModelFolders.open(nan_folder).load(layout, "fp32"))
        with pytest.raises(ValueError, match=r"token of sample 5, after 3 of its prompt and 0 of its response, cannot be chosen: its logits are NaN"):
            generate(model, [[3, 4, 5]], [5], Sampling(max_new_tokens=4, **sampling), eos_id=0)

    run_distributed(write_one, tp * pp, tp=tp, pp=pp)


def test_a_model_of_nan_writes_no_empty_answers(lab, nan_folder, tmp_path):
    def write(layout):
        with pytest.raises(ValueError, match="look for NaN in the model's weights, or use --dtype fp32"):
            write_responses(generation(lab, tmp_path / "out.jsonl", model=str(nan_folder)))

    run_distributed(write, 1)
    assert read(tmp_path / "out.jsonl") == []


def test_numbers_that_are_none_become_null_and_are_named(one_rank, tmp_path):
    results = copy.deepcopy(one_rank[0])
    results["sets"]["tasks"] |= {"lm_loss": math.nan, "reverse_kl": math.inf}
    report = Report(str(tmp_path))
    report._append("answers.jsonl", {"scores": {"rouge_l": math.nan}, "kl": [1.0, [math.inf]]})
    report.finish(results | {"notes": notes(results)})
    refuse = lambda name: pytest.fail(f"{name} is no JSON")
    written = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert written["sets"]["tasks"]["lm_loss"] is written["sets"]["tasks"]["reverse_kl"] is None
    assert "tasks: lm_loss, reverse_kl: not a number, null in results.json; look for NaN in the weights, or use --dtype fp32" in written["notes"]
    row = json.loads((tmp_path / "answers.jsonl").read_text(), parse_constant=refuse)
    assert row == {"scores": {"rouge_l": None}, "kl": [1.0, [None]]}


def test_special_tokens_that_the_text_does_not_show_are_counted(one_rank):
    results = copy.deepcopy(one_rank[0])
    assert results["sets"]["tasks"]["hidden_tokens"] == 0  # the only special token ends the response
    results["sets"]["tasks"]["hidden_tokens"] = 0.25
    assert any("0.25 tokens an answer are special ones that its text does not show" in line for line in notes(results))
    tokenizer = load_tokenizer(Path(results["config"]["model"]))
    assert hidden_ids(tokenizer) == {0}
