"""Exact answers to small problems, and bounds that say how far others can be."""

from sparserec.recovery._bound import Bound, lower_bound
from sparserec.recovery._exhaustive import exhaustive

__all__ = ["Bound", "exhaustive", "lower_bound"]
