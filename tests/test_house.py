"""The rules of the house that a machine can keep: who may import whom, no room without a name, nothing importable as `kernels`."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from transformers.utils import is_kernels_available

ROOT = Path(__file__).parents[1]
ROOMS = [  # a file imports from rooms above its own, or from its own
    "megakd_kernels", "config", "reporting", "runtime", "data", "optimizer", "losses", "schedules", "models", "generation", "methods",
    "checkpointing", "preflight", "evaluation", "trainer", "benchmarking",
]  # fmt: skip
WITHOUT_MEGATRON = [
    "kernels/megakd_kernels",
    "megakd/config.py",
    "megakd/data",
    "megakd/losses",
    "megakd/evaluation/metrics.py",
    "megakd/evaluation/gsm8k.py",
]
FILES = sorted(path for folder in ("megakd", "kernels", "scripts", "checkpoint_tools") for path in (ROOT / folder).rglob("*.py"))


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


def test_nothing_imports_scripts_tools_or_tests():
    for path in FILES:
        if path.is_relative_to(ROOT / "megakd") or path.is_relative_to(ROOT / "kernels"):
            assert not any(name.split(".")[0] in ("scripts", "checkpoint_tools", "tests") for name in imported(path)), path


def test_every_room_has_a_name_and_kernels_is_no_package():
    assert not [
        path for path in FILES if path.name in ("utils.py", "helpers.py", "misc.py", "inspect.py", "profile.py", "logging.py")
    ]
    assert not list(ROOT.glob("kernels/*.py")) and not is_kernels_available(), (
        "transformers takes kernels/ for Hugging Face's library"
    )


def test_functions_are_short_and_public_names_documented():
    lengths, bare = [], []
    for path in FILES:
        tree = ast.parse(path.read_text())
        lengths += [n.end_lineno - n.lineno + 1 for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        bare += [f"{path.relative_to(ROOT)}: no docstring" for _ in [0] if path.read_text() and not ast.get_docstring(tree)]
    lengths.sort()
    assert lengths[-1] <= 80 and lengths[len(lengths) // 2] < 10, (lengths[-1], lengths[len(lengths) // 2])
    assert not bare, bare
