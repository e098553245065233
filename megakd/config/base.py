"""What the configurations of all commands share: how they are checked, and what they tell of flags without effect."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from megakd.config.fields import as_words, flags_of, out_of_range, unusable_paths
from megakd.errors import UserError


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """The settings of one command."""

    def check(self) -> None:
        """Refuse what cannot be, before anything is loaded.

        Raises:
            UserError: the first impossible value or combination, with its flag.
        """
        for error in chain(out_of_range(self), unusable_paths(self), self.validation_errors()):  # a 0 would be divided by in the last
            raise UserError(error)

    def validation_errors(self) -> Iterator[str]:
        """What is wrong, one line each; ranges of numbers stand in their flags."""
        yield from ()

    def unless(self) -> dict[str, tuple[Any, str]]:
        """Flags that are read under a condition: whether it holds, and how a message says that it does not."""
        return {}

    def remarks(self) -> Iterator[str]:
        """Flags given another value than their default, to no effect: allowed, for files of settings are shared, but told."""
        given, usual = self.flat(), type(self)().flat()
        for name, (is_read, how) in self.unless().items():
            if given[name] != usual[name] and not is_read:
                yield f"{' '.join(as_words(name, given[name]))} has no effect {how}"

    def flat(self) -> dict[str, Any]:
        """All settings by flag name, as in config.yaml."""
        return {line.name: value for line, value in flags_of(self)}

    def flags(self) -> list[dataclasses.Field]:
        """All flags, those of groups among them."""
        return [line for line, _ in flags_of(self)]
