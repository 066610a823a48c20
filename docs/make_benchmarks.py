"""Writes the tables of docs/benchmarks.md from the JSON files in benchmarks/results/.

A line `<!-- figures: NAME ... -->` in the page is followed by the table of the named
files, up to `<!-- end -->`. Several files of one benchmark make one table, with the
command of every row. Run it after new figures are in: `python docs/make_benchmarks.py`.
"""

import json
import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- figures: ([\w\- .]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _cell(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _line(cells) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |\n"


def table(names: list[str]) -> str:
    """The Markdown of the named results."""
    reports = [
        json.loads((RESULTS / f"{name}.json").read_text("utf-8")) for name in names
    ]
    first = reports[0]
    dates = sorted({report["date"] for report in reports})
    thread = ", one thread" if all(r["one_thread"] for r in reports) else ""
    where = f"{first['device']}, jax {first['jax']}{thread}; {' to '.join(dates)}."
    columns = list(first["columns"])
    if len(reports) == 1:
        head = f"`{first['command']}`: {where}\n\n"
        rows = first["rows"]
    else:
        head = f"{where[0].upper()}{where[1:]}\n\n"
        columns.append("command")
        rows = [
            [*row, f"`{report['command']}`"]
            for report in reports
            for row in report["rows"]
        ]
    rule = _line(["---"] * len(columns))
    return head + _line(columns) + rule + "".join(_line(row) for row in rows)


def filled(text: str) -> str:
    """The page with every table written anew."""
    return BLOCK.sub(
        lambda found: found.group(1) + table(found.group(2).split()) + found.group(3),
        text,
    )


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text("utf-8")), encoding="utf-8")
