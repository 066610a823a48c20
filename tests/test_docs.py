"""The pages: every block of Python runs, every relative link leads somewhere."""

import inspect
import operator
import pathlib
import re

import jax
import jax.numpy as jnp
import matplotlib as mpl
import optax
import pytest
from flax import linen, nnx

import sparserec

mpl.use("Agg")

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [
    README,
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "how-to").glob("*.md")),
]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.*)$", re.MULTILINE)


def blocks(page):
    """Line number and source of every block of Python."""
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, found.start(1)) + 1, found.group(1))
        for found in BLOCK.finditer(text)
    ]


def prose(page):
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page):
    """What a heading is called in a link, by the rules of GitHub."""
    headings = HEADING.findall(prose(page))
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def execute(page, line, source, namespace):
    # Empty lines in front: a traceback then names the line of the page.
    exec(compile("\n" * (line - 1) + source, str(page), "exec"), namespace)


@pytest.fixture
def reader_session(lenient_promotion):
    """JAX as somebody who tries a page has it, and no figure left open."""
    del lenient_promotion
    from matplotlib import pyplot

    with jax.enable_x64(False):
        yield
    pyplot.close("all")


# Every page compiles what it shows; `make docs` runs them before it builds the site.
WITH_BLOCKS = [page for page in PAGES[1:] if blocks(page)]


@pytest.mark.slow
@pytest.mark.usefixtures("reader_session")
@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run_in_order(page):
    namespace = {}
    for line, source in blocks(page):
        execute(page, line, source, namespace)


@pytest.mark.usefixtures("reader_session")
@pytest.mark.parametrize(
    ("line", "source"), blocks(README), ids=["vector", "linen", "nnx"]
)
def test_every_example_of_the_readme_runs_on_its_own(line, source):
    execute(README, line, source, {})


def public_functions():
    """Every public function, once, under its qualified name."""
    rooms = [sparserec, *(getattr(sparserec, name) for name in sparserec.__all__)]
    found = {}
    for room in filter(inspect.ismodule, rooms):
        for name in room.__all__:
            each = getattr(room, name)
            if inspect.isfunction(each):
                found[f"{each.__module__}.{name}"] = each
    return found


def docstring_blocks():
    return [
        pytest.param(source, id=name.removeprefix("sparserec."))
        for name, function in public_functions().items()
        for source in BLOCK.findall(inspect.getdoc(function) or "")
    ]


class Normalized(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        return linen.BatchNorm(use_running_average=not train)(x)


def what_docstrings_speak_of():
    """The names that examples in docstrings take as given."""
    x = jnp.arange(6.0).reshape(3, 2)
    network = Normalized()
    return {
        "sparserec": sparserec,
        "optax": optax,
        "network": network,
        "variables": network.init(jax.random.key(0), x, train=False),
        "model": nnx.BatchNorm(2, rngs=nnx.Rngs(0)),
        "batches": [x],
        "solution": sparserec.prune(lambda w: jnp.sum(w), x, 2, method="magnitude"),
    }


@pytest.mark.usefixtures("reader_session")
@pytest.mark.parametrize("source", docstring_blocks())
def test_every_example_in_a_docstring_runs(source):
    exec(source, what_docstrings_speak_of())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_relative_link_leads_somewhere(page):
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


def test_every_page_and_picture_is_reached():
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in PAGES
        for target in LINK.findall(prose(page))
    }
    pictures = (ROOT / "docs" / "images").glob("*")
    assert {path.resolve() for path in [*PAGES[1:], *pictures]} <= linked


def test_every_public_name_has_a_page_of_reference():
    pages = (ROOT / "docs" / "api").glob("*.md")
    documented = {
        module
        for page in pages
        for module in re.findall(r"automodule:: ([\w.]+)", page.read_text("utf-8"))
    }
    public = {"sparserec"} | {
        f"sparserec.{name}"
        for name in sparserec.__all__
        if inspect.ismodule(getattr(sparserec, name))
    }
    # A page lists what its module exports: all public names, if all modules are there.
    assert documented == public


def test_tests_and_functions_that_the_pages_name_exist():
    text = "".join(prose(page) for page in PAGES)
    code = "".join(path.read_text("utf-8") for path in ROOT.glob("tests/test_*.py"))
    for name in set(re.findall(r"`(test_\w+)`", text)):
        assert f"def {name}(" in code, name
    named = set(
        re.findall(r"`(?:sr\.)?((?:theory|problems|quadratic)\.(?!py)\w+)", text)
    )
    assert len(named) >= 15
    for name in named:
        operator.attrgetter(name)(sparserec)
