"""From a mask over weights back to the units it keeps."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparserec.structure._apply import checked_leaves
from sparserec.structure._groups import Groups


def kept_units(groups: Groups, mask: Any) -> dict[str, np.ndarray]:
    """Units of which a mask keeps anything, the inverse of `mask`.

    Args:
      groups: result of `groups`.
      mask: booleans with the structure and shapes of the parameters, such as the mask
        of a `Solution`.

    Returns:
      Group name -> bool array of shape `(units,)`, True where any weight of the unit
      is kept: what `shrink` and `resized` take.

    Raises:
      ValueError: if the mask does not fit the groups.
    """
    leaves = [np.asarray(leaf) for leaf in checked_leaves(groups, mask)]
    keep = {}
    for group in groups.groups:
        kept = np.zeros(group.size, bool)
        for member in group.members:
            leaf = leaves[member.leaf]
            others = tuple(i for i in range(leaf.ndim) if i != member.axis)
            along = np.asarray(leaf.any(axis=others))
            np.logical_or.at(kept, member.units, along[member.positions])
        keep[group.name] = kept
    return keep
