"""Makes the notebooks from their text form, and runs them.

python notebooks/_build.py [NAME ...]

`NAME.py`, in the percent format that Jupytext and editors read, is what people write
and review; `NAME.ipynb`, with outputs, is made from it here. A notebook that raises is
not written, one that takes more than 60 seconds is an error. That is meant for two idle
cores; on a crowded machine SPARSEREC_TIME_FACTOR multiplies the limit.

The files hold nothing that changes from run to run: no times, no paths, no random cell
ids, no version of Python. With SPARSEREC_DATA set, one notebook shows MNIST as well;
the outputs in the repository are made with it.
"""

import argparse
import ast
import json
import os
import pathlib
import re
import sys
import time
from typing import NamedTuple

FOLDER = pathlib.Path(__file__).parent
LIMIT = 60  # seconds for one notebook
HANGS = 10  # times the limit: so long a cell may take before it is given up
MARKER = re.compile(r"^# %%( \[markdown\])?$", re.MULTILINE)
COLORS = re.compile(r"\x1b\[[0-9;]*m")


class Cell(NamedTuple):
    """A cell: `"markdown"` or `"code"`, and its text."""

    kind: str
    source: str


def names() -> list[str]:
    """The notebooks, in order."""
    return sorted(path.stem for path in FOLDER.glob("[0-9]*.py"))


def read(name: str) -> str:
    """The text form of a notebook."""
    return (FOLDER / f"{name}.py").read_text(encoding="utf-8")


def cells(text: str) -> list[Cell]:
    """The cells of a percent file; what stands before the first marker is a header."""
    parts = MARKER.split(text)[1:]
    found = []
    for marker, body in zip(parts[::2], parts[1::2], strict=True):
        source = body.strip("\n")
        if marker:
            source = re.sub(r"^# ?", "", source, flags=re.MULTILINE)
        found.append(Cell("markdown" if marker else "code", source))
    return found


def claims(text: str) -> list[str]:
    """What a notebook asserts: the messages of its assertions, in order."""
    asserts = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Assert) and node.msg is not None
    ]
    asserts.sort(key=lambda node: node.lineno)
    return list(dict.fromkeys(ast.literal_eval(node.msg) for node in asserts))


def limit() -> float:
    """Seconds that a notebook may take."""
    return LIMIT * float(os.environ.get("SPARSEREC_TIME_FACTOR", "1"))


def session() -> dict[str, str]:
    """Environment in which a notebook gives the same outputs on every machine."""
    unwanted = {"DISPLAY", "MPLBACKEND"}
    chosen = {
        "JAX_PLATFORMS": "cpu",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",
        "XLA_FLAGS": (
            "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        ),
    }
    return {k: v for k, v in os.environ.items() if k not in unwanted} | chosen


def without_outputs(name: str) -> dict:
    """The notebook of a text form, in nbformat 4.5."""
    common = {"metadata": {}}
    code = common | {"cell_type": "code", "execution_count": None, "outputs": []}
    markdown = common | {"cell_type": "markdown"}
    return {
        "cells": [
            (code if cell.kind == "code" else markdown)
            | {"id": f"cell-{index:02}", "source": cell.source}
            for index, cell in enumerate(cells(read(name)), start=1)
        ],
        "metadata": {
            "jupytext": {"formats": "ipynb,py:percent"},
            "kernelspec": {
                "display_name": "Python 3",
                "language": "python",
                "name": "python3",
            },
            "language_info": {"file_extension": ".py", "name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def run(name: str) -> dict:
    """The notebook with its outputs.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell raised.
    """
    import nbclient
    import nbformat

    fresh = without_outputs(name)
    notebook = nbformat.from_dict(fresh)
    client = nbclient.NotebookClient(
        notebook,
        timeout=int(HANGS * limit()),
        kernel_name="python3",
        record_timing=False,
        # Kernels warn that the connection to this very process is not encrypted.
        extra_arguments=["--log-level=ERROR"],
        coalesce_streams=True,
        resources={"metadata": {"path": str(FOLDER)}},
    )
    client.execute(env=session())
    for cell, done in zip(fresh["cells"], notebook.cells, strict=True):
        if cell["cell_type"] == "code":
            cell["execution_count"] = done["execution_count"]
            cell["outputs"] = [_tidy(output) for output in done["outputs"]]
    return fresh


def _tidy(output: dict) -> dict:
    """An output as it goes into the file: text split into lines, for small diffs."""
    output = json.loads(json.dumps(output))
    if "text" in output:
        output["text"] = output["text"].splitlines(keepends=True)
    if "image/png" in output.get("data", {}):
        output["data"]["text/plain"] = ["<Figure>"]
    return output


def write(name: str, notebook: dict) -> None:
    """Writes the notebook beside its text form."""
    for cell in notebook["cells"]:
        cell["source"] = cell["source"].splitlines(keepends=True)
    text = json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False)
    (FOLDER / f"{name}.ipynb").write_text(text + "\n", encoding="utf-8")


def _build(name: str) -> bool:
    """Runs and writes one notebook, says how it went, and whether all was well."""
    from nbclient.exceptions import CellExecutionError, CellTimeoutError

    start = time.perf_counter()
    try:
        notebook = run(name)
    except (CellExecutionError, CellTimeoutError) as error:
        print(f"{name}: failed\n{COLORS.sub('', str(error))}", file=sys.stderr)
        return False
    seconds = time.perf_counter() - start
    write(name, notebook)
    print(f"{name}: {seconds:.0f} of {limit():.0f} seconds; asserted:")
    for claim in claims(read(name)):
        print(f"  - {claim}")
    if seconds > limit():
        print(f"{name}: too slow", file=sys.stderr)
    return seconds <= limit()


def main() -> int:
    """Command line; the exit status is 1 where a notebook failed or was too slow."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="such as 01_quickstart (default: all)")
    chosen = parser.parse_args().names or names()
    unknown = sorted(set(chosen) - set(names()))
    if unknown:
        parser.error(f"no such notebook: {unknown}; there are {names()}")
    return 0 if all([_build(name) for name in chosen]) else 1


if __name__ == "__main__":
    sys.exit(main())
