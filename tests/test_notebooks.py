"""The notebooks: the pairs are in step, the outputs are clean, and all of them run.

What a notebook claims is asserted in it, with the claim as the message; the slow test
runs the text forms as scripts and counts a notebook as passed if none of it fails.
"""

import ast
import importlib.util
import json
import pathlib
import re
import subprocess
import sys
import types

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
# Of a path of this machine, an address in memory, or a warning.
MACHINE = re.compile(
    r"/(?:home|root|tmp|usr|work|opt|Users)/|0x[0-9a-f]{6,}|[Ww]arning"
)


def load_builder() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("_build", FOLDER / "_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load_builder()
NAMES = build.names()
each_notebook = pytest.mark.parametrize("name", NAMES)


def stored(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))


def source_of(cell: dict) -> str:
    return "".join(cell["source"])


def texts(output: dict) -> str:
    """All text of an output: streams, and results in any textual form."""
    data = output.get("data", {})
    parts = [output.get("text", ""), *(v for k, v in data.items() if "text" in k)]
    return "\n".join("".join(part) for part in parts)


def test_every_text_form_has_its_notebook():
    assert NAMES
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


@each_notebook
def test_pairs_are_in_step(name):
    expected = [(cell.kind, cell.source) for cell in build.cells(build.read(name))]
    actual = [(cell["cell_type"], source_of(cell)) for cell in stored(name)["cells"]]
    assert actual == expected, f"run: python notebooks/_build.py {name}"


@each_notebook
def test_every_cell_was_run_once_in_order_without_an_error(name):
    code = [cell for cell in stored(name)["cells"] if cell["cell_type"] == "code"]
    counts = [cell["execution_count"] for cell in code]
    assert counts == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data"}
    assert all(output.get("name", "stdout") == "stdout" for output in outputs)
    assert any(output["output_type"] == "stream" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2


@each_notebook
def test_nothing_stored_depends_on_the_machine(name):
    notebook = stored(name)
    assert notebook["metadata"] == build.without_outputs(name)["metadata"]
    ids = [cell["id"] for cell in notebook["cells"]]
    assert ids == [f"cell-{index:02}" for index in range(1, len(ids) + 1)]
    assert all(cell["metadata"] == {} for cell in notebook["cells"])
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            assert not MACHINE.search(texts(output)), texts(output)


@each_notebook
def test_every_notebook_claims_something(name):
    text = build.read(name)
    claims = build.claims(text)
    asserts = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Assert)]
    assert len(claims) >= 5
    assert all(node.msg for node in asserts), "an assertion has no message"
    assert all(len(claim) >= 15 for claim in claims)


def test_cells_of_a_percent_file():
    text = (
        "# ---\n# header\n# ---\n\n# %% [markdown]\n# # A\n#\n# b\n\n# %%\nx = 1\n\n\n"
    )
    assert build.cells(text) == [("markdown", "# A\n\nb"), ("code", "x = 1")]
    assert build.claims("assert x, 'a claim'\nassert y\n") == ["a claim"]


@pytest.mark.slow
@each_notebook
def test_notebook_runs(name, tmp_path, record_property):
    # As a script, in a process of its own: it sets up JAX as its readers have it.
    done = subprocess.run(
        [sys.executable, "-W", "error", FOLDER / f"{name}.py"],
        cwd=FOLDER,
        env=build.session() | {"MPLBACKEND": "Agg", "MPLCONFIGDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=build.HANGS * build.limit(),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    record_property("asserted", build.claims(build.read(name)))
