"""Sparse regression as a whole: paths over k, the choice of k, exact small answers."""

from sparserec.recovery._bound import Bound, lower_bound
from sparserec.recovery._exhaustive import exhaustive
from sparserec.recovery._path import path
from sparserec.recovery._record import Path

__all__ = ["Bound", "Path", "exhaustive", "lower_bound", "path"]
