"""Where tables go, and how all of them look."""

import sys
from typing import Literal

from rich.console import Console
from rich.table import Table


def table_of(*columns: tuple[str, Literal["left", "right"]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for position, (name, justify) in enumerate(columns, start=1):
        # In a narrow window the last column, prose, folds; a number is never cut.
        table.add_column(name, justify=justify, no_wrap=position < len(columns), overflow="fold")
    return table


def console() -> Console:
    # A log has no width; a terminal too narrow for a line wraps it itself.
    return Console(highlight=False, soft_wrap=True, markup=False, width=None if sys.stdout.isatty() else 160)
