"""Structured pruning: whole units of any JAX function, and smaller arrays.

`groups` reads from the trace of a function which axes of its parameters must be cut
together. `select` chooses units within a budget, `shrink` removes them from the
arrays and `resized` runs the same function on the smaller arrays. `gate` turns a
loss over weights into a loss over units.
"""

from sparserec.structure._apply import (
    gate,
    keep_temperature,
    mask,
    ones,
    shrink,
    unit_scores,
)
from sparserec.structure._gate_model import gate_model, gate_scores
from sparserec.structure._groups import Frozen, Group, Groups, Member, groups
from sparserec.structure._joint import joint
from sparserec.structure._kept import kept_units
from sparserec.structure._modules import linen_sizes, nnx_sizes
from sparserec.structure._resize import check, resized
from sparserec.structure._select import select, total_cost, unit_costs

__all__ = [
    "Frozen",
    "Group",
    "Groups",
    "Member",
    "check",
    "gate",
    "gate_model",
    "gate_scores",
    "groups",
    "joint",
    "keep_temperature",
    "kept_units",
    "linen_sizes",
    "mask",
    "nnx_sizes",
    "ones",
    "resized",
    "select",
    "shrink",
    "total_cost",
    "unit_costs",
    "unit_scores",
]
