"""What the package promises as a whole: names, docstrings, imports, global state."""

import ast
import dataclasses
import functools
import graphlib
import inspect
import json
import os
import pathlib
import re
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator
from typing import Any

import pytest

import sparserec

PACKAGE = pathlib.Path(sparserec.__file__).parent
PYPROJECT = pathlib.Path(__file__).parents[1] / "pyproject.toml"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# The house: a room may import from the floors below and from its own floor. The side
# rooms stand on top of the solvers, and only the entrance may enter them.
FLOORS = (
    {"_types", "_tree", "_linsolve"},
    {"_top_k", "_within_cost", "select", "budget", "quadratic"},
    {"_solution", "_run"},
    {"saliency", "solvers"},
    {"_prune", "_recalibrate", "_report", "recovery", "structure", "training"},
    {"_plot_structure", "losses", "plot", "problems", "theory"},
    {"__init__", "__main__", "_demo"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


# --- the public names ----------------------------------------------------------------


def public_members(module: types.ModuleType) -> Iterator[tuple[str, Any]]:
    """The names of a module that users are meant to call, with what they mean."""
    names = getattr(module, "__all__", None)
    if names is None:
        names = [
            name
            for name, value in vars(module).items()
            if not name.startswith("_")
            and getattr(value, "__module__", "").startswith(module.__name__)
        ]
    for name in names:
        yield f"{module.__name__}.{name}", getattr(module, name)


def walk_public(module: types.ModuleType) -> Iterator[tuple[str, Any]]:
    """Public members of a module and of the modules among them."""
    for name, value in public_members(module):
        yield name, value
        if inspect.ismodule(value):
            yield from walk_public(value)


PUBLIC = dict(walk_public(sparserec))
DOCUMENTED = {
    name: value
    for name, value in PUBLIC.items()
    # Aliases of foreign types and constants cannot carry a docstring of their own.
    if inspect.ismodule(value)
    or (callable(value) and getattr(value, "__module__", "").startswith("sparserec"))
}
FUNCTIONS = {
    name: value
    for name, value in DOCUMENTED.items()
    if not inspect.ismodule(value) and not inspect.isclass(value)
}
RECORDS = {
    name: value
    for name, value in DOCUMENTED.items()
    if dataclasses.is_dataclass(value) or hasattr(value, "_fields")
}


@pytest.mark.parametrize("name", sparserec.__all__)
def test_every_public_name_exists(name):
    assert hasattr(sparserec, name)


def test_no_public_name_is_listed_twice():
    assert len(set(sparserec.__all__)) == len(sparserec.__all__)


def test_public_names_were_found():
    # The tests below would pass on an empty list.
    assert {"sparserec.iobs", "sparserec.select.top_k"} <= set(FUNCTIONS)
    assert "sparserec.Solution" in RECORDS


@pytest.mark.parametrize("name", DOCUMENTED)
def test_docstring_opens_with_a_summary_line(name):
    doc = DOCUMENTED[name].__doc__ or ""
    generated = f"{name.rpartition('.')[2]}("  # by NamedTuple and dataclass
    assert not doc.startswith(generated), "only the generated docstring"
    summary, _, rest = doc.partition("\n")
    assert re.fullmatch(r"\S.*[.?!]", summary), f"no summary sentence: {summary!r}"
    assert not rest or rest.startswith("\n") or not rest.strip()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstring_explains_every_argument(name):
    function = FUNCTIONS[name]
    doc = function.__doc__ or ""
    arguments = set(inspect.signature(function).parameters) - {"self", "cls"}
    missing = [
        argument
        for argument in arguments
        if not re.search(rf"(?m)^ +[\w*, ]*\b{argument}\b[^:\n]*: *\S", doc)
    ]
    assert not missing


@pytest.mark.parametrize("name", RECORDS)
def test_docstring_explains_every_field(name):
    record = RECORDS[name]
    if dataclasses.is_dataclass(record):
        fields = {field.name for field in dataclasses.fields(record)}
    else:
        fields = set(record._fields)
    missing = [
        field
        for field in fields
        if not field.startswith("_")
        and not re.search(rf"\b{field}\b", record.__doc__ or "")
    ]
    assert not missing


def test_version_is_the_one_of_the_project_file():
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    assert sparserec.__version__ == project["version"]


# --- what an import does -------------------------------------------------------------


def in_fresh_process(code: str, **environment: str) -> Any:
    """Run code in a new interpreter and read what it prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_import_leaves_optional_packages_alone():
    loaded = in_fresh_process(
        "import json, sys, sparserec; "
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    assert "sparserec" in loaded
    assert not {"flax", "matplotlib", "sklearn"} & set(loaded)


def test_import_leaves_jax_alone():
    # No backend of this name exists: creating one array during import would fail.
    changed = in_fresh_process(
        "import json, jax; before = dict(jax.config.values); import sparserec; "
        "print(json.dumps([name for name, value in jax.config.values.items() "
        "if before.get(name) != value]))",
        JAX_PLATFORMS="none_such",
    )
    assert changed == []


# --- what the sources contain --------------------------------------------------------


@functools.cache
def tree_of(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def label(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_no_module_sets_a_jax_option(path):
    called = {
        ast.unparse(node.func)
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call)
    }
    assert not {name for name in called if re.fullmatch(r"(.*\.)?config\.update", name)}


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_no_library_module_prints(path):
    if path.stem in {"__main__", "_demo"}:
        pytest.skip("the demonstration may print")
    called = {
        ast.unparse(node.func)
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call)
    }
    assert "print" not in called


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_no_argument_is_called_sparsity(path):
    # Other packages mean the kept or the removed part by it; ours say k or density.
    names = {node.arg for node in ast.walk(tree_of(path)) if isinstance(node, ast.arg)}
    assert "sparsity" not in names


# --- the rooms -----------------------------------------------------------------------


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if len(parts) > 1 and parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts)


MODULES = {module_name(path): path for path in SOURCES}


def imported_modules(path: pathlib.Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it.

    `from sparserec import x` means the module `x` where there is one and the
    entrance, `__init__`, where `x` is a name.
    """
    package = ("sparserec", *path.relative_to(PACKAGE).parts[:-1])
    targets = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            targets |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join((*above, *filter(None, [node.module])))
            targets |= {(source, alias.name) for alias in node.names}
    found = set()
    for source, name in targets:
        root, _, inside = source.partition(".")
        if root == "sparserec":
            submodule = f"{inside}.{name}".strip(".")
            found.add(submodule if submodule in MODULES else inside or "__init__")
    return found


IMPORTS = {name: imported_modules(path) for name, path in MODULES.items()}


def room(module: str) -> str:
    return module.partition(".")[0]


def test_every_room_has_a_floor():
    assert {room(module) for module in MODULES} <= set(FLOOR)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downwards(module):
    here = room(module)
    upwards = {
        target for target in IMPORTS[module] if FLOOR[room(target)] > FLOOR[here]
    }
    assert not upwards


def test_no_module_imports_itself_in_a_circle():
    graphlib.TopologicalSorter(IMPORTS).prepare()
