"""A store is the teacher: a run that reads one equals the run with the model, at any layout, batch size and order; and what it does not
hold is refused by name."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from distributed import run_distributed
from tasks import make_rows
from test_trainer import numbers, without_figures
from tiny import tiny_folder
from train_tokenizer import train_tokenizer

from megakd import trainer
from megakd.checkpointing import teacher_store
from megakd.checkpointing.model_folder import ModelFolder
from megakd.checkpointing.teacher_store import TeacherStore, key_of
from megakd.config import CacheConfig, EvaluateConfig, parse
from megakd.data.batch import Sample
from megakd.errors import UserError
from megakd.evaluation.evaluator import evaluate
from megakd.teachers import caching
from megakd.teachers.stored import StoredTeacher

KINDS = {"hidden": [], "dense": [], "topk": ["--top-k", "5"]}


def write_rows(file: Path, rows) -> None:
    file.write_text("".join(json.dumps({"prompt": row["prompt"], "response": row["response"], "hint": row["response"][:1]}) + "\n" for row in rows))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A student of fewer ids than its teacher, data, and a store of each kind, written a row at a time on one rank."""
    root = tmp_path_factory.mktemp("stored")
    rows = make_rows(48, seed=0)
    tokenizer = train_tokenizer([row["prompt"] + row["response"] for row in rows])
    for seed, (name, more) in enumerate({"student": 0, "teacher": 3}.items()):
        tiny_folder(root / name, "llama", layers=2, vocab_size=len(tokenizer) + more, seed=seed)
        tokenizer.save_pretrained(root / name)
    write_rows(root / "train.jsonl", rows[:32])
    write_rows(root / "valid.jsonl", rows[32:])
    run_distributed(cache_all, 1, *(cache_command(root, kind) for kind in KINDS))
    return root


def cache_command(root: Path, kind: str, save: str = "", *more) -> list[str]:
    words = ["--teacher-model", root / "teacher", "--model", root / "student", "--train-data", root / "train.jsonl", "--valid-data",
             root / "valid.jsonl", "--max-length", 32, "--max-prompt-length", 24, "--micro-batch-size", 1, "--cache-kind", kind,
             *KINDS[kind], "--save", root / (save or kind), *more]  # fmt: skip
    return [str(word) for word in words]


def train_command(root: Path, save: str, *more, teacher=("--teacher-model", "teacher")) -> list[str]:
    words = ["--method", "kd", "--model", root / "student", teacher[0], root / teacher[1], "--train-data", root / "train.jsonl", "--valid-data",
             root / "valid.jsonl", "--max-length", 32, "--max-prompt-length", 24, "--train-iters", 2, "--micro-batch-size", 1,
             "--global-batch-size", 4, "--lr", "1e-2", "--eval-interval", 2, "--save", root / save, *more]  # fmt: skip
    return [str(word) for word in words]


def stored(kind: str) -> dict:
    return {"teacher": ("--teacher-cache", kind)}


def cache(layout, arguments, file_bytes=None, stop_after=None):
    """The whole command on this rank; with files of so many bytes, killed when so many are written."""
    os.environ["WORLD_SIZE"] = str(torch.distributed.get_world_size())
    caching.MIB = file_bytes or caching.MIB
    replace, written = os.replace, []

    def until(source, target):
        if Path(target).name.startswith("targets"):
            if len(written) == stop_after:
                raise KeyboardInterrupt
            written.append(target)
        replace(source, target)

    teacher_store.os.replace = until
    try:
        caching.cache_teacher(parse(arguments, CacheConfig))
    except KeyboardInterrupt:
        return len(written)
    finally:
        teacher_store.os.replace = replace
    return len(written)


def train(layout, *commands):
    os.environ["WORLD_SIZE"] = str(torch.distributed.get_world_size())
    without_figures()
    for arguments in commands:
        trainer.train(parse(arguments))


def trained(root: Path, save: str, *more, ranks=1, **teacher):
    run_distributed(train, ranks, train_command(root, save, *more, **teacher))
    return numbers(root / save), {file.name: file.read_bytes() for file in (root / save / "hf").glob("*.safetensors")}


@pytest.fixture(scope="module")
def live(inputs):
    """The run with the model: numbers, and the student's bytes."""
    return trained(inputs, "live")


def test_dense_targets_train_as_the_model_does_to_the_bit(inputs, live):
    assert trained(inputs, "from-dense", **stored("dense")) == live


def same(ours, theirs, **tolerance):
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for mine, other in zip(ours, theirs):
        assert mine == pytest.approx(other, **tolerance)


def test_hidden_states_train_as_the_model_does(inputs, live):
    same(trained(inputs, "from-hidden", **stored("hidden"))[0], live[0], rel=1e-6, abs=1e-7)


LAYOUTS = [
    pytest.param(2, {"tp": 2}, ["--tp", 2], id="TP2"),
    pytest.param(2, {"pp": 2}, ["--pp", 2], id="PP2"),
    pytest.param(2, {}, [], id="DP2"),
    pytest.param(1, {}, ["--micro-batch-size", 4], id="another micro-batch size"),
]


@pytest.fixture(scope="module")
def alone(inputs, live):
    """Numbers of the run with each store on one rank, a row at a time; of exact ones the model's."""
    return dict.fromkeys(("hidden", "dense"), live[0]) | {"topk": trained(inputs, "from-topk", **stored("topk"))[0]}


@pytest.mark.parametrize("ranks, layout, flags", LAYOUTS)
def test_one_store_serves_every_layout_and_batch_size(inputs, alone, ranks, layout, flags, request):
    saves = {kind: f"{kind}-{request.node.callspec.id}" for kind in KINDS}
    run_distributed(train, ranks, *(train_command(inputs, save, *flags, **stored(kind)) for kind, save in saves.items()), **layout)
    for kind, save in saves.items():
        same(numbers(inputs / save), alone[kind], rel=2e-4, abs=1e-5)


def test_a_stage_that_takes_no_loss_reads_nothing():
    teacher = object.__new__(StoredTeacher)  # without a store, which it would need
    assert teacher.read(["a batch"], to=SimpleNamespace(is_last_stage=False)) == []


def test_another_order_reads_the_same_store(inputs):
    order = ["--seed", 7]
    assert trained(inputs, "order", *order, **stored("dense")) == trained(inputs, "order-live", *order)


@pytest.mark.parametrize("objective", ["forward_kl", "reverse_kl"])
def test_truncated_targets_say_how_much_they_can_be_wrong(inputs, objective):
    """In the first iteration both students are the same: KL lies between the truncated one and that with the bound; so do held-out ones."""
    flags = ["--kd-objective", objective, "--train-iters", 1]
    (first, step, _), (live_first, live_step, _) = (
        trained(inputs, f"{objective}-{i}", *flags, **teacher)[0] for i, teacher in enumerate((stored("topk"), {}))
    )
    found, bias, whole = step[f"loss/{objective}"], step[f"loss/{objective}_bias"], live_step[f"loss/{objective}"]
    assert 1e-4 < whole - found <= bias < 3
    assert 1e-4 < live_first["valid/reverse_kl"] - first["valid/reverse_kl"] <= first["valid/reverse_kl_bias"]
    assert first["valid/forward_kl_bias"] > 0 and "valid/forward_kl_bias" not in live_first


def score(layout, *commands):
    os.environ["WORLD_SIZE"] = str(torch.distributed.get_world_size())
    return [evaluate(parse(words, EvaluateConfig))["sets"]["valid"] for words in commands]


@pytest.mark.parametrize("ranks, layout, flags", [(1, {}, []), (2, {"tp": 2}, ["--tp", "2"])])
def test_evaluation_compares_with_a_store_as_with_the_model(inputs, ranks, layout, flags):
    words = ["--model", inputs / "student", "--data", inputs / "valid.jsonl", "--max-prompt-length", 24, "--max-new-tokens", 8, "--greedy", *flags]
    teachers = {"model": ["--teacher-model", inputs / "teacher"]} | {kind: ["--teacher-cache", inputs / kind] for kind in KINDS}
    commands = [[*map(str, words), *map(str, teacher)] for teacher in teachers.values()]
    model, hidden, dense, topk = run_distributed(score, ranks, *commands, **layout)[0]
    assert hidden == pytest.approx(model, rel=1e-5) and dense == pytest.approx(model, rel=1e-5)
    for name in ("forward_kl", "reverse_kl"):
        assert 1e-4 < model[name] - topk[name] <= topk[f"{name}_bias"]


# ---- writing


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_command_goes_on_to_the_same_files(inputs, tmp_path, ranks):
    """Two replicas write a file each at a time, and give the same bytes as one."""
    size = 6 * 4 * 64  # of two or three texts
    unbroken = [*cache_command(inputs, "hidden"), "--save", str(tmp_path / "store"), "--file-mib", "1"]
    run_distributed(cache, 1, unbroken, size)
    wanted = bytes_of(tmp_path / "store")
    shutil.rmtree(tmp_path / "store")
    killed = run_distributed(cache, 1, unbroken, size, 3)
    assert killed == [3] and len(list((tmp_path / "store").glob("targets*"))) == 3 < sum(name.startswith("targets") for name in wanted)
    with pytest.raises(UserError, match=r"targets-00003.safetensors of \d+ files is not there yet; the command that writes it, given again"):
        TeacherStore(tmp_path / "store")
    went_on = run_distributed(cache, ranks, unbroken, size)
    assert sum(went_on) == sum(name.startswith("targets") for name in wanted) - 3, "what is there is not written again"
    assert bytes_of(tmp_path / "store") == wanted
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "store").glob("targets*")}
    assert sum(run_distributed(cache, 1, unbroken, size)) == 0 and times == {file: file.stat().st_mtime_ns for file in times}


def rows_of(folder: Path) -> dict[bytes, dict]:
    store = TeacherStore(folder)
    return {key: store.read(key) for key in store._places}


def cache_all(layout, *commands):
    for arguments in commands:
        cache(layout, arguments)


@pytest.mark.parametrize("ranks, layout, flags", [(2, {"tp": 2}, ["--tp", "2"]), (2, {"pp": 2}, ["--pp", "2"]), (1, {}, ["--micro-batch-size", "4"])])
def test_the_writers_layout_changes_no_row(inputs, tmp_path, ranks, layout, flags):
    commands = [[*cache_command(inputs, kind), "--save", str(tmp_path / kind), *flags] for kind in KINDS]
    run_distributed(cache_all, ranks, *commands, **layout)
    for kind in KINDS:
        ours, theirs = rows_of(tmp_path / kind), rows_of(inputs / kind)
        assert ours.keys() == theirs.keys()
        for key, rows in ours.items():
            for name, tensor in rows.items():
                torch.testing.assert_close(tensor, theirs[key][name], rtol=1e-5, atol=2e-5)


def test_the_size_is_told_before(inputs, tmp_path, capfd):
    run_distributed(cache, 1, [*cache_command(inputs, "hidden"), "--save", str(tmp_path / "store")])
    said = capfd.readouterr().out.splitlines()
    rows = TeacherStore(tmp_path / "store").description.rows
    assert re.search(rf"48 texts, {rows} positions × 256 bytes \(hidden\) = 0.0 MiB in 1 files, of which 1 files", said[0])
    assert said[1].startswith("targets-00000.safetensors written")


def test_a_key_is_of_what_the_teacher_reads_and_of_the_response():
    plain = Sample(0, (1, 2), (3, 4))
    assert key_of(plain) == key_of(Sample(5, (1, 2), (3, 4))) == key_of(Sample(0, (9,), (3, 4), (1, 2)))
    others = [Sample(0, (1,), (2, 3, 4)), Sample(0, (1, 2), (3, 5)), Sample(0, (1, 2), (3,)), Sample(0, (1, 2), (3, 4), (1, 2, 2))]
    assert len({key_of(sample) for sample in [plain, *others]}) == 5
    assert key_of(Sample(0, (), (3, 4), (1,))) != key_of(Sample(0, (1,), (3, 4))), "of a text the first token does not count"


def test_a_quantised_teachers_targets_are_its_own(inputs, live):
    pytest.importorskip("torchao")
    quantize = ["--teacher-quantize", "int4"]
    run_distributed(cache, 1, [*cache_command(inputs, "dense", "int4"), *quantize])
    found = trained(inputs, "from-int4", **stored("int4"))
    assert found == trained(inputs, "int4-live", *quantize) and found != live


# ---- what is refused


def refused(inputs, line, *more, kind="hidden", root=None, **teacher):
    """One line, before weights are loaded, and no folder left behind."""
    from megakd import loading

    def check(layout, arguments):
        loading.load_model = lambda *args, **options: pytest.fail("weights were loaded")
        with pytest.raises((UserError, SystemExit)) as found:
            train(layout, arguments)
        return str(found.value)

    command = train_command(inputs, "refused", *more, **(teacher or stored(kind)))
    (said,) = run_distributed(check, 1, command)
    assert re.search(line, said), said
    assert not (inputs / "refused").exists()


def changed(inputs, tmp_path, name, old, new):
    file = tmp_path / name
    file.write_text((inputs / name).read_text().replace(old, new, 1))
    return file


def first_field(inputs, name):
    return json.loads((inputs / "train.jsonl").read_text().splitlines()[0])[name]


def test_a_changed_row_or_response_is_refused_by_its_place(inputs, tmp_path):
    prompt, response = (first_field(inputs, name) for name in ("prompt", "response"))
    other = changed(inputs, tmp_path, "train.jsonl", json.dumps(response), json.dumps(response + "0"))
    refused(inputs, rf"{other} line 1: its response is not the one that --teacher-cache", "--train-data", other)
    other = changed(inputs, tmp_path, "train.jsonl", json.dumps(prompt), json.dumps(prompt + " "))
    refused(inputs, rf"{other} line 1: its prompt, as the teacher reads it, is none of those", "--train-data", other)
    other = changed(inputs, tmp_path, "valid.jsonl", '"response": "', '"response": "1')
    refused(inputs, rf"{other} line 1: its response is not the one", "--valid-data", other)


def test_a_changed_model_is_refused(inputs, tmp_path):
    shutil.copytree(inputs / "teacher", tmp_path / "copy")
    flags = ["--teacher-model", tmp_path / "copy", "--train-iters", 1]
    trained(inputs, "named-beside", *flags, **stored("hidden"))
    tiny_folder(tmp_path / "other", "llama", layers=2, seed=9, vocab_size=TeacherStore(inputs / "hidden").config.vocab_size)
    shutil.copyfile(tmp_path / "other" / "model.safetensors", tmp_path / "copy" / "model.safetensors")
    refused(inputs, r"--teacher-model \S+copy is not, or no longer, the model whose targets --teacher-cache", *flags)


def test_a_changed_tokenizer_and_priming_are_refused(inputs, tmp_path):
    other = shutil.copytree(inputs / "student", tmp_path / "student")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(inputs, r"different tokenizers: id \d+ is", "--model", other)
    refused(inputs, r"--teacher-priming confidence differs from the none that --teacher-cache \S+ was written with", "--teacher-priming", "confidence")
    refused(inputs, r"--teacher-prompt-field hint differs from the \(none\) that --teacher-cache", "--teacher-prompt-field", "hint")


def test_a_store_is_of_the_text_that_the_teacher_reads(inputs):
    primed = ["--teacher-prompt-field", "hint"]
    run_distributed(cache, 1, [*cache_command(inputs, "dense", "hinted"), *primed])
    assert trained(inputs, "from-hinted", *primed, **stored("hinted")) == trained(inputs, "hinted-live", *primed)


@pytest.mark.parametrize(
    "flags, line",
    [
        ("--method promptkd", "--method promptkd trains a soft prompt in front of the teacher, and --teacher-cache has targets alone"),
        ("--method minillm", "--method minillm draws responses from a mixture with the teacher"),
        ("--method minillm --teacher-mixed-alpha 0", "--method minillm keeps the teacher's hidden states and output layer for a phase"),
        ("--method seqkd", "--method seqkd lets the teacher write the responses"),
        ("--method distillm --valid-data v", "--method distillm learns what the student writes"),
        ("--method kd --on-policy-ratio 0.5", "--method kd learns what the student writes"),
        ("--method kd --hidden-coef 1", "--hidden-coef matches the teacher's layers"),
        ("--method kd --teacher-model self --teacher-ema 0.5", "--teacher-ema 0.5 moves a model"),
    ],
)
def test_what_targets_cannot_do_is_one_line(flags, line, capsys):
    with pytest.raises(SystemExit):
        parse(f"--model m --teacher-cache c --train-data d --save s --train-iters 1 {flags}".split())
    said = capsys.readouterr().err
    assert line in said and "give --teacher-model in place of --teacher-cache" in said and said.count("\n") == 1


def test_a_temperature_needs_whole_distributions(inputs):
    refused(inputs, "temperature 2.0 needs whole distributions, and --teacher-cache .* has the 5 likeliest", "--kd-temperature", 2, kind="topk")
    trained(inputs, "warm", "--kd-temperature", 2, "--train-iters", 1, **stored("dense"))


def test_what_is_no_store_is_told(inputs, tmp_path):
    refused(inputs, "--teacher-cache .*teacher: holds no store.json", teacher=("--teacher-cache", "teacher"))
    shutil.copytree(inputs / "hidden", tmp_path / "hidden")
    (tmp_path / "hidden" / "targets-00000.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"targets-00000.safetensors: 6 bytes, truncated or damaged .*; remove it, and give the command that wrote it again"):
        TeacherStore(tmp_path / "hidden")


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--top-k", "6"], "--save .* was begun with another --top-k; give the same command to go on with it, or another --save"),
        (["--cache-kind", "dense"], "--save .* was begun with another --cache-kind"),
        (["--teacher-priming", "confidence"], "--save .* was begun with another what the teacher reads"),
        (["--valid-data", ""], "--save .* was begun with another data"),
        (["--top-k", "5000"], "--top-k 5000 is more than the .* token ids"),
        (["--max-length", "100"], "--max-length 100 is more than the 64 positions of --teacher-model"),
    ],
)
def test_a_store_goes_on_with_what_it_was_begun_with(inputs, flags, line):
    def check(layout, arguments):
        caching.load_model = lambda *args, **options: pytest.fail("weights were loaded")
        with pytest.raises(UserError) as found:
            cache(layout, arguments)
        return str(found.value)

    (said,) = run_distributed(check, 1, [*cache_command(inputs, "topk"), *flags])
    assert re.search(line, said), said


def test_a_student_whose_weights_are_not_read_need_not_fit_the_layout(inputs, tmp_path, monkeypatch):
    teacher = ModelFolder.open(inputs / "teacher", flag="--teacher-model")
    student = tiny_folder(tmp_path / "student", "gpt2", layers=2, n_head=1, vocab_size=teacher.config.vocab_size)
    for file in (inputs / "teacher").glob("tok*"):
        shutil.copyfile(file, student / file.name)
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = [*cache_command(inputs, "dense"), "--model", str(student), "--tp"]
    caching.check(parse([*words, "2"], CacheConfig), teacher, ModelFolder.open(student))
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"--tensor-model-parallel-size 3 does not divide the .* of --teacher-model"):
        caching.check(parse([*words, "3"], CacheConfig), teacher, ModelFolder.open(student))
