"""One form for the figures of all benchmarks: a table, and how it was made."""

import datetime
import json
import os
import pathlib
import shlex
import sys

import jax


def save(
    path: pathlib.Path | None, columns: list[str], rows: list[list], **details
) -> None:
    """Writes a table and its circumstances as JSON; does nothing without a path.

    Args:
      path: file to write, or `None`.
      columns: heads of the table.
      rows: one list for every row, strings or numbers.
      **details: raw figures, anything that JSON can hold.
    """
    if path is None:
        return
    arguments, skip = [], False
    for argument in sys.argv[1:]:
        if not skip and not argument.startswith("--json="):
            arguments.append(argument)
        skip = argument == "--json"
    arguments = [argument for argument in arguments if argument != "--json"]
    module = pathlib.Path(sys.argv[0]).stem
    tunables = os.environ.get("GLIBC_TUNABLES")
    pages = [f"GLIBC_TUNABLES={tunables}"] if tunables else []
    device = jax.devices()[0]
    report = {
        "command": shlex.join(
            [*pages, "python", "-m", f"benchmarks.{module}", *arguments]
        ),
        "date": datetime.date.today().isoformat(),
        "device": device.device_kind,
        "jax": jax.__version__,
        "one_thread": "intra_op_parallelism_threads=1"
        in os.environ.get("XLA_FLAGS", ""),
        "columns": columns,
        "rows": rows,
        "details": details,
    }
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
