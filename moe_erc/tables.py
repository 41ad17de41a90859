"""Tables on the screen in which no number is cut.

Columns that do not fit side by side follow below. A table has the width of the terminal; redirected
output has 80 columns.
"""

import shutil
import sys
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_erc.console import printable

REDIRECTED = 80  # columns
FRAME = 3  # columns that a border and the spaces beside it take


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    footer: Sequence[Sequence[str]] = (),
) -> None:
    """Print rows of cells; `footer` has the rows below a rule.

    The first column names the row, and is repeated in every part of a table. A name longer than
    half of the width is broken over several lines. No other cell is ever broken or shortened.
    """
    rows = [[_one_line(name), *cells] for name, *cells in rows]
    footer = [[_one_line(name), *cells] for name, *cells in footer]
    limit = _width()
    widths = []
    for heading, *cells in zip(columns, *rows, *footer, strict=True):
        widths.append(_narrowest(heading, cells))
    longest_word = max(columns[0].split(), key=len, default="")
    widths[0] = min(widths[0], max(limit // 2 - FRAME, cell_len(longest_word)))
    groups = _side_by_side(widths, limit)
    for number, group in enumerate(groups, start=1):
        part = f"{title} ({number} of {len(groups)})" if len(groups) > 1 else title
        table = Table(title=Text(part))
        # A heading is on one line if there is room for it.
        one_line = {column: max(widths[column], cell_len(columns[column])) for column in group}
        if _total({0: widths[0], **one_line}, group) > limit:
            one_line = {column: widths[column] for column in group}
        table.add_column(Text(columns[0]), width=widths[0], overflow="fold")
        for column, width in one_line.items():
            table.add_column(Text(columns[column]), width=width, justify="right")
        for row in rows:
            table.add_row(*_cells(row, group))
        table.add_section()
        for row in footer:
            table.add_row(*_cells(row, group))
        # rich shortens what does not fit, so the width given is at least that of the table. Without
        # a height it would take 80 columns for a dumb terminal.
        Console(width=max(limit, _total(widths, group)), height=25).print(table)


def _width() -> int:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else REDIRECTED


def _one_line(name: str) -> str:
    return printable(name).replace("\n", "\\n").replace("\t", "\\t")


def _narrowest(heading: str, cells: Sequence[str]) -> int:
    """The smallest width of a column of a table; its heading may be broken between words."""
    return max(map(cell_len, [*heading.split(), *cells]), default=0)


def _side_by_side(widths: Sequence[int], limit: int) -> list[list[int]]:
    """The numbers of all columns but the first, in groups that fit behind the first column."""
    groups = [[]]
    for column in range(1, len(widths)):
        if groups[-1] and _total(widths, [*groups[-1], column]) > limit:
            groups.append([])
        groups[-1].append(column)
    return groups


def _total(widths: Sequence[int], group: Sequence[int]) -> int:
    return 1 + sum(widths[column] + FRAME for column in (0, *group))


def _cells(row: Sequence[str], group: Sequence[int]) -> list[Text]:
    """The cells of a group as text, so that a name such as 'runs/lr[/b]' is no markup."""
    return [Text(row[0]), *(Text(row[column], no_wrap=True) for column in group)]
