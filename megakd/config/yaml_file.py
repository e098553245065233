"""The YAML file of `--config`: a flat list of settings, read within limits that no list of settings meets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from megakd.errors import UserError, read_text, said

MOST_YAML = 64 * 2**10  # bytes; all flags together take less than a tenth
MOST_LEVELS = 8  # of lists and mappings within each other: a setting has one
WAY_OUT = "write one `flag-name: value` a line"


class SettingsLoader(yaml.SafeLoader):
    """Plain values. A reference may stand for one value alone, for lists of references to lists of references grow without end."""

    levels = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """One value, and those in it.

        Raises:
            yaml.YAMLError: too deep, or a reference to more than one value.
        """
        is_reference = self.check_event(yaml.AliasEvent)
        self.levels += 1
        if self.levels > MOST_LEVELS:
            raise yaml.YAMLError(f"more than {MOST_LEVELS} lists or mappings within each other")
        node = super().compose_node(parent, index)
        self.levels -= 1
        if is_reference and not isinstance(node, yaml.ScalarNode):
            raise yaml.YAMLError("a reference *name to a list or a mapping")
        return node


def read_yaml(file: Path) -> dict[Any, Any]:
    """The settings of a file.

    Raises:
        UserError: it cannot be read, or is no mapping.
    """
    text = read_text(file, most=MOST_YAML, flag="--config")
    try:
        values = yaml.load(text, Loader=SettingsLoader) or {}  # a SafeLoader: it makes plain values alone
    except Exception as error:  # YAML's own words for dates, numbers and switches raise whatever comes of a wrong one
        reason = str(error).splitlines()[0] if isinstance(error, yaml.YAMLError | ValueError) and str(error) else said(error)
        raise UserError(f"--config {file}: not YAML ({reason}); {WAY_OUT}") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {file}: holds a {type(values).__name__}; {WAY_OUT}")
    return values
