"""Pictures: accuracy against density, densities by leaf, convergence, masks.

Every function draws into the axes it is given, or into a new figure, and returns the
axes. Global settings of matplotlib stay as they are. Names stand beside the lines;
figures made with `layout="constrained"` leave room for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import jax
import numpy as np

from sparserec import _tree
from sparserec._plot_structure import structure
from sparserec._report import report
from sparserec._solution import Solution
from sparserec._types import Params

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.lines import Line2D

__all__ = ["convergence", "density", "mask", "structure", "tradeoff"]

# Okabe & Ito (2008): told apart with any common color vision; black comes last.
_COLORS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)
_MARKERS = "osD^vPX"
_GREY = "#777777"
_LINE_OF_TEXT = 13  # points, the least distance of two names
_MOST_LABELS = 40  # bars or ticks that are still legible one by one

Curve = Sequence[tuple[float, float]]
"""Pairs of density (a fraction) and accuracy (any unit)."""


def tradeoff(
    results: Mapping[str, Curve],
    *,
    after: Mapping[str, Curve] | None = None,
    dense: float | None = None,
    label: str = "accuracy, %",
    ax: Axes | None = None,
) -> Axes:
    """Accuracy against density, a line for every method.

    Args:
      results: for every method a sequence of pairs (density, accuracy), the density
        a fraction in (0, 1], in any order.
      after: the same after fine-tuning, drawn dashed in the color of the method,
        with a legend.
      dense: accuracy of the dense network, drawn as a dotted line.
      label: name of the vertical axis with its unit.
      ax: axes to draw into; a new figure if `None`.

    Returns:
      The axes. Density runs from many weights on the left to few on the right, in
      percent on a logarithmic scale; a NaN leaves a gap.

    Raises:
      ValueError: `results` is empty, a density lies outside (0, 1], or `after` has
        a method that `results` does not have.
      ImportError: matplotlib is missing.
    """
    after = {} if after is None else after
    _check_curves(results, after)
    ax = _axes(ax)
    lines = {}
    for index, (method, curve) in enumerate(results.items()):
        style = {"color": _color(index), "marker": _marker(index), "markersize": 5}
        (lines[method],) = ax.plot(*_percent(curve), **style)
        if method in after:
            tuned = {**style, "linestyle": "--", "markerfacecolor": "none"}
            ax.plot(*_percent(after[method]), **tuned)
    if dense is not None:
        lines["dense"] = ax.axhline(dense, color=_GREY, linestyle=":", linewidth=1)
    ax.set_xscale("log")
    ticks = sorted({100 * d for curve in results.values() for d, _ in curve})
    if len(ticks) <= 8:
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.set_xticks([], minor=True)
    if not ax.xaxis_inverted():
        ax.invert_xaxis()
    ax.set_xlabel("weights kept, % (logarithmic)")
    ax.set_ylabel(label)
    _tidy(ax)
    if after:
        for text, style in (("pruned", "-"), ("fine-tuned", "--")):
            ax.plot([], [], color=_GREY, linestyle=style, label=text)
        ax.legend(loc="lower left", frameon=False)
    _name_lines(ax, lines)
    return ax


def density(params: Params, solution: Solution, *, ax: Axes | None = None) -> Axes:
    """How much every leaf kept, a bar for each.

    Args:
      params: the params before pruning.
      solution: what the solver returned; one lane of it, if it was batched.
      ax: axes to draw into; a new figure if `None`.

    Returns:
      The axes: leaves from top to bottom in tree order, density in percent, with
      the counts beside the bars of up to 40 leaves.

    Raises:
      ValueError: `solution` does not have the leaf paths and shapes of `params`.
      ImportError: matplotlib is missing.
    """
    rows = report(params, solution).rows
    ax = _axes(ax)
    places = np.arange(len(rows))
    bars = ax.barh(places, [100 * row.density for row in rows], color=_COLORS[0])
    if len(rows) <= _MOST_LABELS:
        ax.set_yticks(places, [row.path or "(the array)" for row in rows])
        texts = [
            f"{100 * row.density:.3g} % ({row.kept:,} of {row.total:,})" for row in rows
        ]
        ax.bar_label(bars, texts, padding=3, fontsize="small")
    else:
        ax.set_yticks([])
        ax.set_ylabel(f"{len(rows)} leaves")
    ax.invert_yaxis()
    # Room for the counts beside a full bar.
    ax.set_xlim(0, 145 if len(rows) <= _MOST_LABELS else 100)
    ax.set_xticks([0, 25, 50, 75, 100])
    ax.set_xlabel("weights kept, %")
    _tidy(ax)
    return ax


def convergence(
    solutions: Solution | Mapping[str, Solution],
    *,
    quantity: Literal["objective", "change"] = "objective",
    ax: Axes | None = None,
) -> Axes:
    """The course of a solve, step by step.

    Args:
      solutions: what a solver returned, or several by name; one lane each, if they
        were batched.
      quantity: `"objective"`, the loss after each step, or `"change"`, the relative
        change of the params.
      ax: axes to draw into; a new figure if `None`.

    Returns:
      The axes. The vertical axis is logarithmic where every value is positive.

    Raises:
      ValueError: no solution, an unknown quantity, or batched solutions.
      ImportError: matplotlib is missing.
    """
    if quantity not in ("objective", "change"):
        raise ValueError(
            f"`quantity` must be 'objective' or 'change', got {quantity!r}."
        )
    named = {"": solutions} if isinstance(solutions, Solution) else dict(solutions)
    if not named:
        raise ValueError("`solutions` is empty: there is nothing to draw.")
    curves = {}
    for name, solution in named.items():
        values = np.asarray(getattr(solution.history, quantity), float)
        if values.ndim != 1:
            raise ValueError(
                f"a history has shape {values.shape}: the solution is batched. Take "
                "one lane, `jax.tree.map(lambda x: x[0], solution)`."
            )
        curves[name] = values[: int(solution.iterations)]
    ax = _axes(ax)
    lines = {}
    for index, (name, values) in enumerate(curves.items()):
        steps = np.arange(1, len(values) + 1)
        # A single step would be an invisible line.
        marker = _marker(index) if len(values) <= _MOST_LABELS else None
        (lines[name],) = ax.plot(
            steps, values, color=_color(index), marker=marker, markersize=4
        )
    everything = np.concatenate(list(curves.values()))
    finite = everything[np.isfinite(everything)]
    if finite.size and np.all(finite > 0):
        ax.set_yscale("log")
    _whole_numbers(ax.xaxis)
    ax.set_xlabel("step")
    ax.set_ylabel("loss" if quantity == "objective" else "relative change of params")
    _tidy(ax)
    _name_lines(ax, lines)
    return ax


def mask(solution: Solution, path: str = "", *, ax: Axes | None = None) -> Axes:
    """A picture of the mask of one leaf, dark where a weight is kept.

    Args:
      solution: what a solver returned; one lane of it, if it was batched.
      path: leaf to show, such as `"Dense_0/kernel"`; a single array has the path
        `""`.
      ax: axes to draw into; a new figure if `None`.

    Returns:
      The axes. A matrix is shown as it is, a vector as one row; of more axes all but
      the last are joined into rows. Where entries are smaller than pixels the grey
      is their mean.

    Raises:
      ValueError: there is no such leaf, or it holds nothing; lists the paths.
      ImportError: matplotlib is missing.
    """
    paths = _tree.paths(solution.mask)
    if path not in paths:
        raise ValueError(f"there is no leaf {path!r}; the leaf paths are {paths}.")
    flags = np.asarray(jax.tree.leaves(solution.mask)[paths.index(path)])
    if flags.size == 0:
        raise ValueError(f"leaf {path!r} holds no weight: shape {flags.shape}.")
    matrix = flags.reshape(-1, flags.shape[-1]) if flags.ndim else flags.reshape(1, 1)
    ax = _axes(ax)
    ax.imshow(matrix.astype(float), cmap="Greys", vmin=0, vmax=1, aspect="auto")
    _whole_numbers(ax.xaxis)
    _whole_numbers(ax.yaxis)
    joined = " x ".join(map(str, flags.shape[:-1]))
    ax.set_ylabel(f"rows ({joined})" if flags.ndim > 2 else "row")
    ax.set_xlabel("column")
    kept = int(flags.sum())
    name = path or "the array"
    ax.set_title(f"{name}: {kept:,} of {flags.size:,} kept ({kept / flags.size:.1%})")
    return ax


# --- common to all -------------------------------------------------------------------


def _axes(ax: Axes | None) -> Axes:
    """The axes given, or those of a new figure."""
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "pictures need matplotlib: `pip install 'sparserec[demo]'`."
        ) from error
    return pyplot.subplots(layout="constrained")[1]


def _color(index: int) -> str:
    return _COLORS[index % len(_COLORS)]


def _marker(index: int) -> str:
    return _MARKERS[index % len(_MARKERS)]


def _percent(curve: Curve) -> tuple[list[float], list[float]]:
    """Densities in percent, descending, and their accuracies."""
    ordered = sorted(((100 * d, a) for d, a in curve), key=lambda p: -p[0])
    return [d for d, _ in ordered], [a for _, a in ordered]


def _check_curves(results: Mapping[str, Curve], after: Mapping[str, Curve]) -> None:
    if not results or not all(results.values()):
        raise ValueError(
            "`results` must map every method to its pairs (density, accuracy), such "
            f"as {{'iobs': [(0.1, 95.0), (0.05, 91.2)]}}; got {dict(results)}."
        )
    unknown = set(after) - set(results)
    if unknown:
        raise ValueError(
            f"`after` has the methods {sorted(unknown)}, which `results` does not "
            f"have; it has {list(results)}."
        )
    for method, curve in [*results.items(), *after.items()]:
        wrong = [d for d, _ in curve if not 0 < d <= 1]
        if wrong:
            raise ValueError(
                f"densities are fractions in (0, 1]; {method!r} has {wrong}. Divide "
                "percent by 100."
            )


def _tidy(ax: Axes) -> None:
    """No frame on the open sides, a faint grid behind the data."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)


def _whole_numbers(axis: Axis) -> None:
    """Ticks at whole numbers only, if need be at a single one."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(
        MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
    )


def _name_lines(ax: Axes, lines: Mapping[str, Line2D]) -> None:
    """Writes every name beside the end of its line, none over another."""
    ax.autoscale_view()  # settles the limits, which the transforms below read
    ends = {}
    for name, line in lines.items():
        points = np.asarray(line.get_xydata(), float)
        points = points[np.isfinite(points).all(axis=1)]
        if name and len(points):
            # Of a line across the whole axes x counts in axes, not in data.
            ends[name] = line.get_transform().transform(points[-1])
    gap = _LINE_OF_TEXT * ax.figure.get_dpi() / 72
    heights = _spread([end[1] for end in ends.values()], gap)
    for (name, end), height in zip(ends.items(), heights, strict=True):
        x, y = ax.transData.inverted().transform((end[0], height))
        ax.annotate(
            name,
            (x, y),
            (7, 0),
            textcoords="offset points",
            color=lines[name].get_color(),
            verticalalignment="center",
            annotation_clip=False,
        )


def _spread(heights: list[float], gap: float) -> list[float]:
    """Heights moved apart to at least `gap`, in the same order, about the same mean.

    Overlapping neighbors are merged into groups that are laid out around their mean.
    """
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    groups: list[tuple[float, list[int]]] = []
    for index in order:
        center, members = heights[index], [index]
        while groups and (
            center - groups[-1][0] < gap * (len(members) + len(groups[-1][1])) / 2
        ):
            other, earlier = groups.pop()
            size = len(members) + len(earlier)
            center = (center * len(members) + other * len(earlier)) / size
            members = earlier + members
        groups.append((center, members))
    placed = list(heights)
    for center, members in groups:
        for rank, index in enumerate(members):
            placed[index] = center + gap * (rank - (len(members) - 1) / 2)
    return placed
