"""Tables as text, for commands that print their result."""

import io

from rich.console import Console
from rich.table import Table

WIDEST = 1000
"""Characters of a line; a table takes what it needs."""


def as_text(table: Table) -> str:
    """Return a table as lines without trailing spaces."""
    output = io.StringIO()
    Console(file=output, width=WIDEST).print(table)
    return "\n".join(line.rstrip() for line in output.getvalue().rstrip().splitlines())
