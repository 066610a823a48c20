"""The drawing of groups: what is colored is what is cut together."""

import matplotlib as mpl
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from structure_cases import CASES

from sparserec import _plot_structure, structure

mpl.use("Agg")


@pytest.fixture
def ax():
    return Figure(layout="constrained").subplots()


def groups_of(name):
    case = CASES[name]()
    return structure.groups(case.function, case.params, *case.args)


def filled(ax):
    """Place -> color of every filled rectangle."""
    return {
        (round(p.get_x(), 2), round(p.get_y() + p.get_height() / 2)): to_hex(
            p.get_facecolor()
        )
        for p in ax.patches
        if p.get_fill()
    }


def test_axes_of_one_group_have_one_color(ax):
    groups = groups_of("mlp")
    assert _plot_structure.structure(groups, ax=ax) is ax
    colors = filled(ax)
    labels = [text.get_text() for text in ax.get_yticklabels()]
    assert labels == list(groups.paths)

    def color(path, axis):
        return colors[round(axis * 1.12, 2), -groups.paths.index(path)]

    for group in groups.groups:
        seen = {color(m.path, m.axis) for m in group.members}
        assert len(seen) == 1
        assert seen != {"#e8e8e8"}
    assert color("a", 0) == color("d", 1) == "#e8e8e8"  # inputs and outputs
    assert color("a", 1) != color("c", 1)
    frames = [p for p in ax.patches if not p.get_fill() and p.get_linewidth() > 1]
    reads = {(m.path, m.axis) for g in groups.groups for m in g.members if m.reads}
    assert len(frames) == len(reads)


@pytest.mark.parametrize("name", CASES)
def test_every_case_can_be_drawn(name, ax):
    _plot_structure.structure(groups_of(name), include=lambda _: True, ax=ax)
    ax.figure.canvas.draw()


def test_rows_and_names_can_be_chosen(ax):
    groups = groups_of("mlp")
    first = groups.groups[0].name
    _plot_structure.structure(groups, include=["c", "a"], names={first: "mine"}, ax=ax)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["c", "a"]
    words = [text.get_text() for text in ax.get_legend().get_texts()]
    assert words[0] == "mine (8 units)"
    assert words[-2:] == ["keeps its size", "reads units"]


def test_unknown_or_no_rows_are_refused(ax):
    groups = groups_of("mlp")
    with pytest.raises(ValueError, match=r"names \['z'\], which do not exist"):
        _plot_structure.structure(groups, include=["z"], ax=ax)
    with pytest.raises(ValueError, match="nothing to draw"):
        _plot_structure.structure(groups, include=lambda _: False, ax=ax)


def test_without_axes_a_figure_is_made():
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    ax = _plot_structure.structure(groups_of("mlp"))
    (number,) = set(pyplot.get_fignums()) - set(before)
    assert pyplot.figure(number) is ax.figure
    pyplot.close(number)
