"""The rules of the house that a machine can keep: who may import whom, no room without a name, nothing importable as `kernels`."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from transformers.utils import is_kernels_available

ROOT = Path(__file__).parents[1]
ROOMS = [  # a file imports from rooms above its own, or from its own
    "megakd_kernels", "errors", "launch", "model_files", "config", "reporting", "runtime", "data", "optimizer", "losses", "schedules", "models", "checkpointing",
    "loading", "generation", "teachers", "faults", "methods", "memory", "begun_with", "preflight", "run_data", "evaluation", "trainer", "dry_run", "verify", "api", "simulation", "planning",
]  # fmt: skip
WITHOUT_MEGATRON = [
    "kernels/megakd_kernels",
    "megakd/errors.py",
    "megakd/model_files.py",
    "megakd/config",
    "megakd/data",
    "megakd/losses",
    "megakd/evaluation/metrics.py",
    "megakd/evaluation/gsm8k.py",
]
SAID_ELSEWHERE = {  # public names that need no docstring, by folder: where their reader finds what they do
    "megakd/models": {"unsupported", "transformer_config", "model_arguments", "table"},  # a family's page: in Family's fields
    "megakd/schedules.py": {"recv_forward", "send_backward_recv_forward", "recv_backward", "send_forward_recv_backward"},  # in megatron-core
    "scripts": {"main", "parse_args"},  # in the file's first lines and in --help
    "checkpoint_tools": {"parser", "convert"},  # there as well
    "": {"forward", "backward"},  # torch calls them: in the class's docstring
}
FILES = sorted(path for folder in ("megakd", "kernels", "benchmarks", "scripts", "checkpoint_tools") for path in (ROOT / folder).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Dotted names of everything a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(dotted: str) -> str | None:
    parts = dotted.split(".")
    if parts[0] == "megakd_kernels":
        return parts[0]
    return parts[1] if parts[0] == "megakd" and len(parts) > 1 and parts[1] in ROOMS else None


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.is_relative_to(ROOT / "megakd") and p.parent != ROOT], ids=lambda p: str(p.relative_to(ROOT))
)
def test_a_file_imports_only_from_rooms_above_its_own(path):
    own = path.relative_to(ROOT / "megakd").with_suffix("").parts[0]
    if own == "__init__":
        return
    above = ROOMS[: ROOMS.index(own) + 1]
    for name in imported(path):
        assert room(name) is None or room(name) in above, f"{path.relative_to(ROOT)} imports {name}"


def test_what_needs_no_megatron_imports_none():
    for place in WITHOUT_MEGATRON:
        for path in FILES:
            if path.is_relative_to(ROOT / place):
                assert not any(name.startswith("megatron") for name in imported(path)), path


def test_megatrons_global_state_is_asked_in_runtime_alone():
    for path in FILES:
        if not path.is_relative_to(ROOT / "megakd" / "runtime"):
            assert not any("parallel_state" in name for name in imported(path)), path


def test_nothing_that_is_installed_imports_what_is_not():
    apart = [ROOT / name for name in ("scripts", "checkpoint_tools", "tests", "benchmarks")]
    names = {path.stem for folder in apart for path in (folder, *folder.glob("*.py"), *folder.glob("*/__init__.py"))}
    names |= {"megakd_benchmarks"}
    for path in FILES:
        if path.is_relative_to(ROOT / "megakd") or path.is_relative_to(ROOT / "kernels"):
            assert not names & {name.split(".")[0] for name in imported(path)}, path


def test_every_room_has_a_name_and_kernels_is_no_package():
    assert not [
        path for path in FILES if path.name in ("utils.py", "helpers.py", "misc.py", "inspect.py", "profile.py", "logging.py")
    ]
    assert not list(ROOT.glob("kernels/*.py")) and not is_kernels_available(), (
        "transformers takes kernels/ for Hugging Face's library"
    )


def test_an_installation_has_megakd_and_its_kernels_alone(tmp_path):
    """Asked from another folder, so that only what is installed answers."""
    names = {"kernels", "benchmarks", "megakd_benchmarks", "scripts", "checkpoint_tools", "tests", "tasks", "train_tokenizer"}
    code = f"from importlib.util import find_spec; print(*filter(find_spec, {['megakd', 'megakd_kernels', *sorted(names)]}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": ""})
    assert found.stdout.split() == ["megakd", "megakd_kernels"], found.stderr


TREES = {path: ast.parse(path.read_text()) for path in FILES}
CLASSES = {node.name: node for tree in TREES.values() for node in tree.body if isinstance(node, ast.ClassDef)}


def public(tree: ast.Module) -> list[tuple[ast.ClassDef | None, ast.FunctionDef | ast.ClassDef]]:
    """Functions, classes and methods (with their class) whose names do not begin with an underscore."""
    owners = [None, *(node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_"))]
    named = [(owner, node) for owner in owners for node in (owner or tree).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return [(owner, node) for owner, node in named if not node.name.startswith("_")]


def inherits_docstring(owner: ast.ClassDef, method: str) -> bool:
    """A base class documents the method."""
    names = [base.id for base in owner.bases if isinstance(base, ast.Name)]
    for base in (CLASSES[name] for name in names if name in CLASSES):
        own = [node for node in base.body if isinstance(node, ast.FunctionDef) and node.name == method]
        if any(map(ast.get_docstring, own)) or inherits_docstring(base, method):
            return True
    return False


def is_exempt(path: Path, owner: ast.ClassDef | None, node: ast.FunctionDef | ast.ClassDef) -> bool:
    """It is said elsewhere: by a base class, by the table above, or, of a Triton kernel, beside each of its arguments."""
    named = any(path.is_relative_to(ROOT / folder) and node.name in names for folder, names in SAID_ELSEWHERE.items())
    is_kernel = node.name.endswith("_kernel") and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
    return named or is_kernel or (owner is not None and inherits_docstring(owner, node.name))


CONFIG = sorted((ROOT / "megakd" / "config").rglob("*.py"))


def run_at_import(path: Path) -> set[str]:
    """The modules that a file imports as it is imported itself: not what is for type checkers alone."""
    nodes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)]
    return {node.module for node in nodes}


def test_the_pages_of_config_are_short_and_import_each_other_one_way():
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in CONFIG if path.name != "__init__.py"}
    graph = {name: run_at_import(path) & modules.keys() for name, path in modules.items()}
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError
    for path in modules.values():
        assert "megakd.config" not in run_at_import(path) and len(path.read_text().splitlines()) <= 210, path


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_public_names_say_what_the_reader_cannot_see(path):
    bare = [] if ast.get_docstring(TREES[path]) else ["the file itself"]
    for owner, node in public(TREES[path]):
        if not ast.get_docstring(node) and not is_exempt(path, owner, node):
            bare.append(f"line {node.lineno}: {owner.name + '.' if owner else ''}{node.name}")
    assert not bare, f"without a docstring (or a leading underscore, if nothing outside the file needs it): {', '.join(bare)}"


def test_functions_are_short():
    lengths = sorted(n.end_lineno - n.lineno + 1 for tree in TREES.values() for n in ast.walk(tree) if isinstance(n, ast.FunctionDef))
    assert lengths[-1] <= 80 and lengths[len(lengths) // 2] < 10, (lengths[-1], lengths[len(lengths) // 2])
