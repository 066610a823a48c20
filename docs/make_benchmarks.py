"""Writes the tables of docs/benchmarks.md from the JSON files in benchmarks/results/.

A line `<!-- figures: NAME ... -->` in the page is followed by the tables of the named
files, up to `<!-- end -->`. Several files of one row each make one table, with the
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


def _where(reports: list[dict]) -> str:
    """Device, version and dates."""
    first = reports[0]
    dates = sorted({report["date"] for report in reports})
    thread = ", one thread" if all(r["one_thread"] for r in reports) else ""
    return f"{first['device']}, jax {first['jax']}{thread}; {' to '.join(dates)}."


def _rows(columns: list[str], rows: list[list]) -> str:
    rule = _line(["---"] * len(columns))
    return _line(columns) + rule + "".join(_line(row) for row in rows)


def _alone(report: dict) -> str:
    """A table under the command that measured it."""
    head = f"`{report['command']}`: {_where([report])}\n\n"
    return head + _rows(report["columns"], report["rows"])


def _together(reports: list[dict]) -> str:
    """One table of reports with one row each, with the command of every row."""
    where = _where(reports)
    rows = [[*report["rows"][0], f"`{report['command']}`"] for report in reports]
    head = f"{where[0].upper()}{where[1:]}\n\n"
    return head + _rows([*reports[0]["columns"], "command"], rows)


def table(names: list[str]) -> str:
    """The Markdown of the named results."""
    reports = [
        json.loads((RESULTS / f"{name}.json").read_text("utf-8")) for name in names
    ]
    if len(reports) > 1 and all(len(report["rows"]) == 1 for report in reports):
        return _together(reports)
    return "\n".join(_alone(report) for report in reports)


def filled(text: str) -> str:
    """The page with every table written anew."""
    return BLOCK.sub(
        lambda found: found.group(1) + table(found.group(2).split()) + found.group(3),
        text,
    )


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text("utf-8")), encoding="utf-8")
