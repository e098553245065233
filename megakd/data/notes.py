"""What a reader of data tells without stopping: once for each kind of thing and file."""

from megakd.errors import tell


class Notes:
    """Rows of a file of which the same is to be told: the first of each kind, and how many follow."""

    def __init__(self) -> None:
        self._first: dict[str, str] = {}  # kind: the line to be told
        self._rows: dict[str, int] = {}

    def add(self, kind: str, where: str, what: str = "") -> None:
        """A row at `where` of which `kind` is true; `what` says how, of the first."""
        self._first.setdefault(kind, f"{where}%s: {kind}{what}")
        self._rows[kind] = self._rows.get(kind, 0) + 1

    def tell(self) -> None:
        """One line a kind, in the order in which they came up."""
        for kind, line in self._first.items():
            more = self._rows[kind] - 1
            tell(line.replace("%s", f" and {more:,} more row{'s' * (more > 1)}" if more else "", 1))
