"""The pages: every block of Python runs, every relative link leads somewhere."""

import inspect
import operator
import pathlib
import re

import jax
import matplotlib as mpl
import pytest

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


WITH_BLOCKS = [page for page in PAGES[1:] if blocks(page)]


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
