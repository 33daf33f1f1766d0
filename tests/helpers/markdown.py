"""What a report or a card says, whatever the Markdown that says it."""

import re

Table = list[list[str]]


def sections(text: str) -> dict[str, str]:
    """What stands under each heading, of any level, up to the next one."""
    pieces = re.split(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def facts(text: str) -> dict[str, str]:
    """The lines `- **Name**: value`, without the marks of code."""
    return {name: value.replace("`", "") for name, value in re.findall(r"^- \*\*(.+?)\*\*: (.+)$", text, re.MULTILINE)}


def tables(text: str) -> list[Table]:
    """The cells of each table, the head first; each is whole, and its cells are without the marks of code."""
    found = []
    for block in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()]
        head, rule, *rows = [[cell.strip().replace("`", "").replace(r"\|", "|") for cell in line] for line in lines]
        assert all(re.fullmatch(":?-+:?", cell) for cell in rule), rule
        assert all(len(row) == len(head) for row in (rule, *rows)), block
        found.append([head, *rows])
    return found


def table(text: str) -> Table:
    """The rows of the only table, without its head."""
    (only,) = tables(text)
    return only[1:]


def by_name(rows: Table) -> dict[str, list[str]]:
    """The other cells of each row by its first, which no two rows share."""
    named = {name: cells for name, *cells in rows}
    assert len(named) == len(rows), rows
    return named
