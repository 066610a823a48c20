"""Quadratic models of a loss and the curvatures they are made of."""

from sparserec.quadratic._block_rows import BlockLowRank
from sparserec.quadratic._builders import (
    block_diagonal,
    dense,
    diagonal,
    least_squares,
    low_rank,
)
from sparserec.quadratic._explicit import BlockDiagonal, Dense, Diagonal, LowRank
from sparserec.quadratic._fisher import Fisher, fisher
from sparserec.quadratic._gradient_curvature import GradientRows
from sparserec.quadratic._input_grams import InputGrams
from sparserec.quadratic._layerwise import Layerwise, layerwise
from sparserec.quadratic._linear_predictor import LinearPredictor, linear_predictor
from sparserec.quadratic._matrix_free import (
    CurvatureFn,
    GaussNewton,
    Hessian,
    MatrixFree,
    gauss_newton,
    hessian,
    softmax_cross_entropy,
    squared_error,
)
from sparserec.quadratic._model import Curvature, QuadraticModel, mean_curvature
from sparserec.quadratic._objective import Objective, make_objective

__all__ = [
    "BlockDiagonal",
    "BlockLowRank",
    "Curvature",
    "CurvatureFn",
    "Dense",
    "Diagonal",
    "Fisher",
    "GaussNewton",
    "GradientRows",
    "Hessian",
    "InputGrams",
    "Layerwise",
    "LinearPredictor",
    "LowRank",
    "MatrixFree",
    "Objective",
    "QuadraticModel",
    "block_diagonal",
    "dense",
    "diagonal",
    "fisher",
    "gauss_newton",
    "hessian",
    "layerwise",
    "least_squares",
    "linear_predictor",
    "low_rank",
    "make_objective",
    "mean_curvature",
    "softmax_cross_entropy",
    "squared_error",
]
