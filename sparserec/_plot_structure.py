"""A drawing of the units of a function: which axes of which arrays go together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from sparserec.structure import Group, Groups

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe & Ito (2008), without black; further groups repeat them with hatching.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_FROZEN, _EDGE = "#e8e8e8", "#777777"
_UNIT = 0.62  # height of an array's row
_WIDTH, _GAP = 1.0, 0.12  # of the box of an axis, and between two


class _Box(NamedTuple):
    """One axis of one array."""

    row: int
    column: int
    size: int
    groups: tuple[int, ...]  # that sit on it
    reads: bool


def structure(
    groups: Groups,
    *,
    include: Callable[[str], bool] | Sequence[str] | None = None,
    names: dict[str, str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """The groups of a function: arrays as rows of axes, a color for every group.

    Args:
      groups: result of `sparserec.structure.groups`.
      include: parameter paths to draw, in this order, or a predicate; all that a group
        touches if `None`.
      names: what to call the groups in the legend, by group name; others keep theirs.
      ax: axes to draw into; a new figure if `None`.

    Returns:
      The axes. Every row is an array, every box one of its axes with its length. Boxes
      of one color are cut together; a thick frame marks the axes that read the units,
      where `gate` acts; grey axes keep their size. An axis that carries several groups
      is divided among them.

    Raises:
      ValueError: `include` names a parameter that does not exist, or there is nothing
        to draw.
      ImportError: matplotlib is missing.
    """
    from matplotlib.patches import Rectangle

    rows = _rows(groups, include)
    shown = _shown(groups, rows)
    if ax is None:
        from matplotlib import pyplot

        width = 2.2 + 1.0 * max(len(groups.axes[number]) for number in rows)
        height = 0.6 + 0.34 * len(rows) + 0.3 * len(shown)
        _, ax = pyplot.subplots(figsize=(width, height), layout="constrained")
    for box in _boxes(groups, rows, shown):
        left, bottom = box.column * (_WIDTH + _GAP), -box.row - _UNIT / 2
        count = max(1, len(box.groups))
        for place, number in enumerate(box.groups or (-1,)):
            ax.add_patch(
                Rectangle(
                    (left + place * _WIDTH / count, bottom),
                    _WIDTH / count,
                    _UNIT,
                    facecolor=_FROZEN if number < 0 else _color(number),
                    hatch=None if number < len(_COLORS) else "///",
                    edgecolor="white",
                    linewidth=0,
                )
            )
        ax.add_patch(
            Rectangle(
                (left, bottom),
                _WIDTH,
                _UNIT,
                fill=False,
                edgecolor="black" if box.reads else _EDGE,
                linewidth=2.0 if box.reads else 0.6,
            )
        )
        ax.text(
            left + _WIDTH / 2,
            -box.row,
            f"{box.size:,}",
            ha="center",
            va="center",
            fontsize="small",
            color="white" if box.groups else "#444444",
        )
    _finish(ax, groups, rows, shown, names or {})
    return ax


def _color(number: int) -> str:
    return _COLORS[number % len(_COLORS)]


def _rows(
    groups: Groups, include: Callable[[str], bool] | Sequence[str] | None
) -> list[int]:
    """Numbers of the parameters to draw."""
    if include is None:
        touched = {m.leaf for group in groups.groups for m in group.members}
        rows = [number for number in range(len(groups.paths)) if number in touched]
    elif callable(include):
        rows = [i for i, path in enumerate(groups.paths) if include(path)]
    else:
        missing = [path for path in include if path not in groups.paths]
        if missing:
            raise ValueError(
                f"`include` names {missing}, which do not exist; the parameters are "
                f"{list(groups.paths)[:12]}."
            )
        rows = [groups.paths.index(path) for path in include]
    if not rows:
        raise ValueError("there is nothing to draw: no parameter is left.")
    return rows


def _shown(groups: Groups, rows: Sequence[int]) -> list[Group]:
    """The groups with a place on one of the rows."""
    return [
        group
        for group in groups.groups
        if any(member.leaf in rows for member in group.members)
    ]


def _boxes(groups: Groups, rows: Sequence[int], shown: Sequence[Group]) -> list[_Box]:
    boxes = []
    for row, leaf in enumerate(rows):
        for column, axis in enumerate(groups.axes[leaf]):
            here = [
                (number, member)
                for number, group in enumerate(shown)
                for member in group.members
                if (member.leaf, member.axis) == (leaf, column)
            ]
            numbers = tuple(dict.fromkeys(number for number, _ in here))
            reads = any(member.reads for _, member in here)
            boxes.append(_Box(row, column, axis.size, numbers, reads))
    return boxes


def _finish(
    ax: Axes,
    groups: Groups,
    rows: Sequence[int],
    shown: Sequence[Group],
    names: dict[str, str],
) -> None:
    """Names of the arrays, a legend of the groups, and no frame."""
    from matplotlib.patches import Patch

    ax.set_yticks([-row for row in range(len(rows))], [groups.paths[i] for i in rows])
    ax.tick_params(length=0)
    columns = max(1, *(len(groups.axes[number]) for number in rows))
    ax.set_xlim(-_GAP, columns * (_WIDTH + _GAP))
    ax.set_ylim(-len(rows) + 0.5, 0.5)
    ticks = [column * (_WIDTH + _GAP) + _WIDTH / 2 for column in range(columns)]
    ax.set_xticks(ticks, [f"axis {column}" for column in range(columns)])
    ax.xaxis.tick_top()
    ax.spines[:].set_visible(False)
    handles: list[Any] = [
        Patch(
            facecolor=_color(number),
            hatch=None if number < len(_COLORS) else "///",
            label=f"{names.get(group.name, group.name)} ({group.size:,} units)",
        )
        for number, group in enumerate(shown)
    ]
    handles.append(Patch(facecolor=_FROZEN, edgecolor=_EDGE, label="keeps its size"))
    handles.append(
        Patch(facecolor="none", edgecolor="black", linewidth=2.0, label="reads units")
    )
    ax.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        frameon=False,
        fontsize="small",
    )
