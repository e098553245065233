"""Every way out that a message names exists: flags are some command's, files are there."""

from __future__ import annotations

import ast
import dataclasses
import re
from functools import cache
from pathlib import Path

import pytest
import tyro

from megakd.config import (
    AttentionConfig,
    BenchmarkConfig,
    CacheConfig,
    Config,
    EvaluateConfig,
    GenerateConfig,
    SystemsConfig,
    flag_name,
)
from megakd.config.plan import PlanConfig
from megakd.config.verify import VerifyConfig

ROOT = Path(__file__).parents[1]
FILES = sorted(path for folder in ("megakd", "kernels", "scripts", "checkpoint_tools") for path in (ROOT / folder).rglob("*.py"))
KINDS = {"pretrain_kd.py": Config, "evaluate.py": EvaluateConfig, "generate.py": GenerateConfig, "benchmark.py": BenchmarkConfig}
KINDS |= {"cache_teacher.py": CacheConfig, "analyze_attention.py": AttentionConfig, "plan.py": PlanConfig}
KINDS |= {"megakd.verify": VerifyConfig, "benchmark_systems.py": SystemsConfig}
OF_OTHERS = {"--nproc_per_node", "--log-dir", "--help", "--config"}  # torchrun's; argparse's and tyro's; taken off before the flags are read
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*\w")


def strings(tree: ast.AST) -> list[str]:
    """What a program may say: its string constants of more than one word, docstrings left out."""
    docstrings = {id(node.body[0].value) for node in ast.walk(tree) if getattr(node, "body", None) and isinstance(node.body, list)
                  and isinstance(node.body[0], ast.Expr)}  # fmt: skip
    texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in docstrings]
    return [text for text in texts if " " in text]


@cache
def flags_of(kind: type) -> set[str]:
    """Of a command that tyro parses, other spellings included."""
    parser = tyro.extras.get_parser(kind, default=kind())
    return {flag.replace("_", "-") for action in parser._actions for flag in action.option_strings} | {
        spelling for name, value in kind().flat().items() for spelling in (flag_name(name), flag_name(f"no_{name}") if isinstance(value, bool) else "")
    }  # fmt: skip


def argparse_flags(path: Path) -> set[str]:
    """What add_argument is called with, in a file of scripts or tools; an f-string's end is anything."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("add_argument")]
    return {arg.value for call in calls for arg in call.args if isinstance(arg, ast.Constant)}


TOOL = (ROOT / "checkpoint_tools" / "tool.py").read_text()  # whose spellings of other projects are understood, too
ALL = OF_OTHERS.union(FLAG.findall(TOOL), *(flags_of(kind) for kind in KINDS.values()), *(argparse_flags(path) for path in FILES))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_flag_and_file_that_a_message_names_is_there(path):
    for text in strings(ast.parse(path.read_text())):
        unknown = [flag for flag in FLAG.findall(text) if flag not in ALL and flag.replace("_", "-") not in ALL]
        assert not unknown, f"{unknown[0]} in {text!r} is no flag of any command"
        for name in re.findall(r"(?<![\w/.])(?:docs/[\w/]+\.md|(?:scripts|checkpoint_tools)/[\w/]+\.py)", text):
            assert (ROOT / name).is_file(), f"{name} in {text!r} is not there"
        for name in re.findall(r"(?<![\w/.*-])(\w+_\w+\.py)\b", text):
            assert any(file.name == name for file in FILES), f"{name} in {text!r} is not there"


ONLY_IN = {  # flags that a module's messages may name, by who calls it: a way out of another command is none
    "megakd/trainer.py": "pretrain_kd.py",
    "megakd/run_data.py": "pretrain_kd.py",
    "megakd/preflight.py": "pretrain_kd.py",
    "megakd/methods": "pretrain_kd.py",
    "megakd/optimizer.py": "pretrain_kd.py",
    "megakd/generation/write_responses.py": "generate.py",
    "megakd/evaluation/report.py": "evaluate.py",
    "megakd/evaluation/evaluation_set.py": "evaluate.py",
    "benchmarks/megakd_benchmarks": "benchmark.py",
}


@pytest.mark.parametrize("place, command", ONLY_IN.items())
def test_a_command_names_no_flag_that_it_does_not_have(place, command):
    for path in (path for path in FILES if path.is_relative_to(ROOT / place)):
        for text in strings(ast.parse(path.read_text())):
            wrong = [flag for flag in FLAG.findall(text) if flag not in flags_of(KINDS[command])]
            assert not wrong, f"{path.name}: {wrong[0]} in {text!r} is no flag of {command}"


SPEAK = ("validation_errors", "no_response", "_missing", "_contradictions", "unless", "remarks", "unread")


@pytest.mark.parametrize("command, kind", KINDS.items())
def test_the_complaints_of_a_command_name_its_own_flags(command, kind):
    trees = [ast.parse(path.read_text()) for path in (ROOT / "megakd" / "config").rglob("*.py")]
    classes = {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}
    groups = [type(value) for value in vars(kind()).values() if dataclasses.is_dataclass(value)]
    names = {base.__name__ for group in (kind, *groups) for base in group.__mro__}
    for base in names & classes.keys():
        methods = [node for node in classes[base].body if isinstance(node, ast.FunctionDef) and node.name in SPEAK]
        for text in (text for method in methods for text in strings(method)):
            unknown = set(FLAG.findall(text)) - flags_of(kind)
            assert not unknown, f"{unknown} in {text!r} is no flag of {command}"
