"""Pictures: what is drawn is the data, and nothing global changes."""

import itertools
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from sparserec import plot
from sparserec._solution import History, Solution

mpl.use("Agg")

BEFORE = {
    "magnitude": [(0.02, 15.0), (0.2, 88.0), (0.1, 40.0)],
    "I-OBS": [(0.2, 97.0), (0.1, 96.5), (0.02, 93.0)],
}
AFTER = {"magnitude": [(0.2, 96.0), (0.02, 31.0)]}


@pytest.fixture
def ax():
    return Figure(layout="constrained").subplots()


def make_solution(mask, steps=4):
    """A solution with a history of the given length and as much padding."""
    padding = jnp.full(steps, jnp.nan)
    values = jnp.concatenate([2.0 ** -jnp.arange(1.0, steps + 1), padding])
    return Solution(
        params=mask,
        mask=mask,
        objective=values[steps - 1],
        iterations=jnp.int32(steps),
        status=jnp.int32(1),
        history=History(values, values / 10, values, values),
    )


def solve():
    rng = np.random.default_rng(0)
    params = {
        "conv": jnp.asarray(rng.normal(size=(2, 3, 4))),
        "head": jnp.asarray(rng.normal(size=(4, 2))),
        "bias": jnp.asarray(rng.normal(size=4)),
    }
    mask = jax.tree.map(lambda x: (jnp.abs(x) > 0.7) | (x.ndim < 2), params)
    return params, make_solution(mask)


def drawings():
    params, solution = solve()
    return {
        "tradeoff": lambda ax: plot.tradeoff(BEFORE, after=AFTER, dense=97.5, ax=ax),
        "density": lambda ax: plot.density(params, solution, ax=ax),
        "convergence": lambda ax: plot.convergence({"a": solution}, ax=ax),
        "mask": lambda ax: plot.mask(solution, "head", ax=ax),
    }


# --- common to all -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tradeoff", "density", "convergence", "mask"])
def test_draws_where_it_is_told_and_changes_nothing_else(name, ax):
    from matplotlib import pyplot

    settings, figures = dict(mpl.rcParams), pyplot.get_fignums()
    assert drawings()[name](ax) is ax
    ax.figure.canvas.draw()
    assert dict(mpl.rcParams) == settings
    assert pyplot.get_fignums() == figures
    assert ax.get_xlabel()


@pytest.mark.parametrize("name", ["tradeoff", "density", "convergence", "mask"])
def test_without_axes_it_makes_one_new_figure(name):
    from matplotlib import pyplot

    before = set(pyplot.get_fignums())
    result = drawings()[name](None)
    (new,) = set(pyplot.get_fignums()) - before
    assert pyplot.figure(new) is result.figure
    pyplot.close(new)


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'sparserec\[demo\]'"):
        plot.tradeoff(BEFORE)


# --- tradeoff ------------------------------------------------------------------------


def test_tradeoff_draws_every_point(ax):
    plot.tradeoff(BEFORE, after=AFTER, dense=97.5, ax=ax)
    lines = [line for line in ax.lines if len(line.get_xdata()) > 0]
    solid, dashed, other, dense = lines
    np.testing.assert_allclose(solid.get_xydata(), [[20, 88], [10, 40], [2, 15]])
    np.testing.assert_allclose(dashed.get_xydata(), [[20, 96], [2, 31]])
    np.testing.assert_allclose(other.get_xydata()[:, 1], [97, 96.5, 93])
    assert np.all(np.asarray(dense.get_ydata()) == 97.5)
    assert solid.get_color() == dashed.get_color() != other.get_color()
    assert dashed.get_linestyle() == "--"
    assert ax.get_xscale() == "log"
    assert ax.xaxis_inverted()
    assert [t.get_text() for t in ax.get_xticklabels()] == ["2", "10", "20"]
    assert {t.get_text() for t in ax.texts} == {"magnitude", "I-OBS", "dense"}


def test_names_stand_beside_their_lines_and_not_over_each_other():
    ax = Figure(figsize=(6, 4), layout="constrained").subplots()
    curves = {f"method {i}": [(0.2, 97.0), (0.02, 93.0 + i / 10)] for i in range(5)}
    plot.tradeoff({**curves, "low": [(0.2, 90.0), (0.02, 50.0)]}, dense=93.2, ax=ax)
    ax.figure.canvas.draw()
    boxes = {text.get_text(): text.get_window_extent() for text in ax.texts}
    assert len(boxes) == 7
    named = sorted(boxes.values(), key=lambda box: box.y0)
    for below, above in itertools.pairwise(named):
        assert below.y1 <= above.y0 + 2  # pixels
    low = boxes["low"]
    _, height = ax.transData.transform((2, 50.0))
    assert abs((low.y0 + low.y1) / 2 - height) < 3
    figure = ax.figure.bbox
    assert all(figure.x0 <= box.x0 < box.x1 <= figure.x1 for box in boxes.values())


@pytest.mark.parametrize(
    ("results", "after", "words"),
    [
        ({}, None, "must map every method"),
        ({"a": []}, None, "must map every method"),
        ({"a": [(20, 90.0)]}, None, "Divide percent by 100"),
        ({"a": [(0.0, 90.0)]}, None, r"\(0, 1\]"),
        ({"a": [(0.5, 90.0)]}, {"b": [(0.5, 91.0)]}, r"\['b'\]"),
    ],
)
def test_tradeoff_refuses_what_it_cannot_draw(results, after, words, ax):
    with pytest.raises(ValueError, match=words):
        plot.tradeoff(results, after=after, ax=ax)


@hypothesis.given(
    st.lists(st.floats(0, 1000), max_size=8), st.floats(0.5, 50), st.randoms()
)
def test_spreading_keeps_order_distance_and_mean(heights, gap, random):
    heights = sorted(heights)
    random.shuffle(heights)
    placed = plot._spread(heights, gap)
    assert len(placed) == len(heights)
    order = np.argsort(heights, kind="stable")
    assert np.all(np.diff(np.asarray(placed)[order]) >= gap * (1 - 1e-9))
    if heights:
        assert np.mean(placed) == pytest.approx(np.mean(heights), abs=1e-6)
    if np.all(np.diff(np.sort(heights)) >= gap):
        np.testing.assert_allclose(placed, heights)


# --- the others ----------------------------------------------------------------------


def test_density_has_a_bar_for_every_leaf(ax):
    params, solution = solve()
    plot.density(params, solution, ax=ax)
    widths = [bar.get_width() for bar in ax.patches]
    leaves = jax.tree.leaves(solution.mask)
    np.testing.assert_allclose(widths, [100 * np.mean(leaf) for leaf in leaves])
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == ["bias", "conv", "head"]
    assert "100 % (4 of 4)" in {text.get_text() for text in ax.texts}


def test_density_of_many_leaves_stays_legible(ax):
    params = {f"layer{i:03}": jnp.full((2, 2), i + 1.0) for i in range(60)}
    solution = make_solution(jax.tree.map(lambda x: x > 20, params))
    plot.density(params, solution, ax=ax)
    assert len(ax.patches) == 60
    assert len(ax.get_yticks()) == 0
    assert ax.get_ylabel() == "60 leaves"


@pytest.mark.parametrize("quantity", ["objective", "change"])
def test_convergence_draws_the_history_without_its_padding(quantity, ax):
    _, solution = solve()
    steps = int(solution.iterations)
    assert steps < solution.history.objective.size
    plot.convergence(solution, quantity=quantity, ax=ax)
    (line,) = ax.lines
    np.testing.assert_array_equal(line.get_xdata(), np.arange(1, steps + 1))
    history = np.asarray(getattr(solution.history, quantity))
    np.testing.assert_array_equal(line.get_ydata(), history[:steps])
    assert np.isfinite(np.asarray(line.get_ydata())).all()


def test_convergence_is_logarithmic_only_above_zero(ax):
    _, solution = solve()
    assert plot.convergence(solution, ax=ax).get_yscale() == "log"
    lower = solution.history._replace(objective=solution.history.objective - 10)
    other = Figure().subplots()
    plot.convergence({"low": solution._replace(history=lower)}, ax=other)
    assert other.get_yscale() == "linear"
    assert [text.get_text() for text in other.texts] == ["low"]


def test_convergence_refuses_what_it_cannot_draw(ax):
    _, solution = solve()
    with pytest.raises(ValueError, match="empty"):
        plot.convergence({}, ax=ax)
    with pytest.raises(ValueError, match="'objective' or 'change'"):
        plot.convergence(solution, quantity="loss", ax=ax)  # pyright: ignore
    batched = jax.tree.map(lambda x: jnp.stack([x, x]), solution)
    with pytest.raises(ValueError, match="one lane"):
        plot.convergence(batched, ax=ax)


def test_mask_shows_the_entries(ax):
    _, solution = solve()
    plot.mask(solution, "conv", ax=ax)
    (image,) = ax.images
    expected = np.asarray(solution.mask["conv"]).reshape(6, 4)
    np.testing.assert_array_equal(np.asarray(image.get_array()), expected)
    assert f"{expected.sum()} of 24" in ax.get_title()
    assert ax.get_ylabel() == "rows (2 x 3)"


def test_mask_of_a_single_array_needs_no_path(ax):
    plot.mask(make_solution(jnp.array([False, True, False])), ax=ax)
    np.testing.assert_array_equal(ax.images[0].get_array(), [[0, 1, 0]])


def test_mask_of_an_unknown_leaf_lists_the_leaves(ax):
    _, solution = solve()
    with pytest.raises(ValueError, match=r"\['bias', 'conv', 'head'\]"):
        plot.mask(solution, "kernel", ax=ax)
