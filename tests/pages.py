"""Tables of pages in Markdown, as tests read them."""


def tables_of(page: str, title: str) -> list[dict[str, list[str]]]:
    """The tables after a heading, each by first cell (of rows that share one, the last)."""
    return [{row[0]: row for row in table} for table in _cells(page, title)]


def rows_of(page: str, title: str) -> dict[str, list[str]]:
    """The first of them."""
    return tables_of(page, title)[0]


def cells_of(page: str, title: str) -> list[list[list[str]]]:
    """Their cells, row by row, without headings."""
    return [table[2:] for table in _cells(page, title)]


def _cells(page: str, title: str) -> list[list[list[str]]]:
    section = page.split(f"## {title}\n")[1].split("\n## ")[0]
    tables = [part for part in section.split("\n\n") if part.startswith("| ")]
    return [
        [[cell.strip() for cell in line.strip("| ").split(" |")] for line in table.splitlines()]
        for table in tables
    ]
