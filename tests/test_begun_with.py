"""A run is continued with what it was begun with: contents count, names and places do not."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
from distributed import run_distributed
from test_trainer import command, numbers, run, write_inputs

from megakd import begun_with
from megakd.config import Config, parse
from megakd.config.base import flags_of
from megakd.dry_run import dry_run
from megakd.errors import UserError

ANEW = "since the run in --save .* was begun; put it back as it was, or give another --save to start anew$"


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """Two of four iterations, by a primed teacher, a template and a divergence of the user's own."""
    root = write_inputs(tmp_path_factory.mktemp("begun"))
    for name, text in {"asked": "{{ instruction }}", "primed": "Think. {{ question }}"}.items():
        (root / f"{name}.jinja").write_text(text)
    (root / "own.py").write_text("def own(log_q, log_p, total):\n    return total(log_q.exp() * (log_q - log_p))\n")
    run_distributed(run, 2, flags(root), 3, tp=2)
    return root


def flags(root: Path, **more) -> list[str]:
    own = {
        "prompt-template": root / "asked.jinja", "teacher-priming": root / "primed.jinja", "kd-objective": f"{root}/own.py:own", "eval-interval": 4,
    }  # fmt: skip
    return command(root, more.pop("save", "run"), "kd", **(own | {"tp": 2} | more))


@pytest.fixture
def root(begun, tmp_path) -> Path:
    """A copy elsewhere."""
    return Path(shutil.copytree(begun, tmp_path / "moved"))


def checked(arguments: list[str], ranks: int = 2) -> None:
    dry_run(parse([*arguments, "--dry-run", "--ranks", str(ranks)]))


def refused(layout, arguments) -> str:
    with pytest.raises(UserError) as error:
        run(layout, arguments)
    return str(error.value)


def replace(file: Path, old: str, new: str) -> None:
    """Without another size."""
    assert len(old) == len(new) and old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


CHANGES = {  # what is changed, and what is said of it
    "training data": (lambda root: replace(root / "train.jsonl", "response", "Response"), r"--train-data \S*train.jsonl: has changed"),
    "held-out data": (lambda root: (root / "valid.jsonl").write_text((root / "train.jsonl").read_text()), r"--valid-data \S*valid.jsonl: has changed"),
    "a template": (lambda root: (root / "asked.jinja").write_text("{{ instruction }}!"), r"--prompt-template \S*asked.jinja: has changed"),
    "a priming": (lambda root: replace(root / "primed.jinja", "Think", "Guess"), r"--teacher-priming \S*primed.jinja: has changed"),
    "a divergence": (lambda root: (root / "own.py").open("a").write("# other\n"), r"--kd-objective \S*own.py: has changed"),
    "one bit of the teacher": (lambda root: flip(root / "teacher/model.safetensors"), r"--teacher-model \S*teacher: model.safetensors has changed"),
    "the student's config": (lambda root: replace(root / "student/config.json", "0.1", "0.2"), r"--model \S*student: config.json has changed"),
    "a file of the tokenizer": (lambda root: (root / "student/chat_template.jinja").write_text("x"), r"--model \S*student: chat_template.jinja is new"),
    "a file that is gone": (
        lambda root: (root / "teacher/generation_config.json").unlink(), r"--teacher-model \S*teacher: generation_config.json is gone"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_what_has_changed_is_named(root, what):
    change, said = CHANGES[what]
    change(root)
    with pytest.raises(UserError, match=f"^{said} {ANEW}"):
        checked(flags(root))


def test_a_run_goes_on_where_its_files_lie_now_and_not_with_others(root, begun):
    for old, new in {"student": "a student", "train.jsonl": "other.jsonl"}.items():
        (root / old).rename(root / new)
    (root / "teacher" / "eval_results.json").write_text("{}")  # of no model's
    arguments = flags(root, **{"model": root / "a student", "train-data": root / "other.jsonl"})
    (root / "other.jsonl").write_text((root / "other.jsonl").read_text() + "\n")
    before = {path: path.stat().st_mtime_ns for path in (root / "run").rglob("*")}
    said = run_distributed(refused, 2, arguments, tp=2)
    assert said[0] == said[1] and "--train-data" in said[0] and "other.jsonl: has changed since" in said[0]
    assert before == {path: path.stat().st_mtime_ns for path in (root / "run").rglob("*")}, "nothing is touched"
    shutil.copy(begun / "train.jsonl", root / "other.jsonl")
    run_distributed(run, 2, arguments, tp=2)
    assert [row["iteration"] for row in numbers(root / "run") if "grad_norm" in row] == [1, 2, 3, 4]
    with pytest.raises(UserError, match=r"--prompt-template plain differs from the \S*asked.jinja of the run"):
        checked(flags(root, **{"prompt-template": "plain"}))
    with pytest.raises(UserError, match=r"--kd-objective \S*own.py:other differs from the \S*own.py:own of the run"):
        checked(flags(root, **{"kd-objective": f"{root}/own.py:other"}))


def test_a_run_of_a_version_that_kept_no_checksums_goes_on_and_keeps_them(root, begun):
    file, settings = root / "run" / begun_with.FILE, root / "run" / "config.yaml"
    kept = file.read_text()
    file.unlink()
    with pytest.raises(UserError, match=r"--model .* differs from the"):
        checked(flags(root))  # of such a run paths are all that is known
    settings.write_text(settings.read_text().replace(str(begun), str(root)))
    checked(flags(root))
    run_distributed(run, 2, flags(root), tp=2)
    assert file.read_text() == kept
    file.write_text(kept[:30])
    with pytest.raises(UserError, match=r"begun_with.json: not JSON .*; remove it, and what the run reads is compared with nothing"):
        checked(flags(root))


def on_two_hosts(layout, arguments, other: Path):
    """Rank 1 is on another machine, whose copy of the data differs."""
    if layout.tp_rank:
        socket.gethostname = lambda: "elsewhere"
        begun_with.data_files = lambda path: [other if Path(path).name == "train.jsonl" else Path(path)]
    return refused(layout, arguments)


def test_hosts_read_the_same_files(root):
    replace_in = root / "elsewhere.jsonl"
    shutil.copy(root / "train.jsonl", replace_in)
    replace(replace_in, "response", "Response")
    said = run_distributed(on_two_hosts, 2, flags(root, save="new"), replace_in, tp=2)
    here = os.uname().nodename
    assert said[0] == said[1] and "--train-data on elsewhere" in said[0] and f"against {here}, where rank 0 is; copy the same files to both" in said[0]


def test_every_path_that_a_run_reads_is_compared():
    """A flag that comes later, too."""
    paths = {line.name for line, _ in flags_of(Config()) if line.metadata.get("path")} - {"save"}
    compared = {"model", "teacher_model", "teacher_cache", "kd_objective", *begun_with.DATA, *begun_with.TEMPLATES}
    assert paths == compared
    assert json.dumps(begun_with.beside_places(Config()))


def test_a_flag_that_is_given_no_more_is_told_where_the_settings_are_gone(root):
    (root / "run" / "config.yaml").unlink()
    arguments = flags(root)
    at = arguments.index("--valid-data")
    with pytest.raises(UserError, match=f"^--valid-data: is gone {ANEW}"):
        checked(arguments[:at] + arguments[at + 2 :])
