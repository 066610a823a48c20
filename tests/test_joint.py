"""Several outputs over one design: against autodiff, NumPy and all subsets."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.sparse import BCOO

from sparserec import _tree, recovery
from sparserec.recovery._joint import JointCurvature, JointLikelihood
from sparserec.recovery._rows import Design

ROWS, SIZE, OUTPUTS = 40, 6, 3


def data(seed=0):
    rng = np.random.default_rng(seed)
    design = rng.normal(size=(ROWS, SIZE)) + 1
    weights = np.zeros((SIZE, OUTPUTS))
    weights[[1, 4]] = rng.normal(size=(2, OUTPUTS))
    return design, design @ weights + rng.normal(size=(ROWS, OUTPUTS)), rng


def check(curvature, hessian, like):
    """All that a curvature says against its matrix."""
    size = hessian.shape[0]
    for column in range(0, size, 5):
        unit = _tree.layout(like).split(jnp.zeros(size).at[column].set(1))
        product = _tree.flatten(curvature.matvec(unit))
        np.testing.assert_allclose(product, hessian[:, column], atol=1e-9)
    diagonal = _tree.flatten(curvature.diagonal())
    np.testing.assert_allclose(diagonal, np.diagonal(hessian), rtol=1e-9)
    index = jnp.asarray([0, 5, 7, size - 1])
    np.testing.assert_allclose(
        curvature.columns(index), hessian[:, np.asarray(index)], atol=1e-9
    )
    inner = hessian[np.ix_(index, index)]
    np.testing.assert_allclose(curvature.block(index), inner, atol=1e-9)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_curvature_of_classes_is_the_hessian(kind):
    design, scores, rng = data()
    matrix = jnp.asarray(design)
    matrix = BCOO.fromdense(matrix) if kind == "sparse" else matrix
    mean, scale = design.mean(axis=0), 1 / design.std(axis=0)
    rows = Design(matrix, jnp.asarray(mean), jnp.asarray(scale), intercept=True)
    labels = jnp.asarray(np.eye(OUTPUTS)[np.argmax(scores, axis=1)])
    args = (rows, labels, jnp.asarray(rng.uniform(1, 2, ROWS)), jnp.asarray(0.3))
    params = {
        "coefficients": jnp.asarray(rng.normal(size=(SIZE, OUTPUTS))),
        "intercept": jnp.asarray(rng.normal(size=OUTPUTS)),
    }
    loss = JointLikelihood()
    model = JointCurvature()(loss, params, args)
    plain = jnp.asarray((design - mean) * scale)
    layout = _tree.layout(params)

    def flat_loss(flat):
        unit = Design(plain, jnp.zeros(SIZE), jnp.ones(SIZE), intercept=True)
        return loss(layout.split(flat), unit, *args[1:])

    flat = _tree.flatten(params)
    np.testing.assert_allclose(model.value, flat_loss(flat), rtol=1e-10)
    slope = _tree.flatten(model.gradient)
    np.testing.assert_allclose(slope, jax.grad(flat_loss)(flat), atol=1e-9)
    check(model.curvature, np.asarray(jax.hessian(flat_loss)(flat)), params)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_several_responses_in_standard_form(kind):
    design, responses, rng = data(1)
    share = rng.uniform(1, 2, ROWS)
    matrix = jnp.asarray(design)
    standard = recovery.regression(
        BCOO.fromdense(matrix) if kind == "sparse" else matrix,
        jnp.asarray(responses),
        weights=jnp.asarray(share),
    )
    center = np.average(design, axis=0, weights=share)
    spread = np.sqrt(np.average((design - center) ** 2, axis=0, weights=share))
    scaled = (design - center) / spread
    gram = (scaled * share[:, None]).T @ scaled
    check(
        standard.model.curvature, np.kron(gram, np.eye(OUTPUTS)), standard.model.center
    )
    weights = rng.normal(size=(SIZE, OUTPUTS))
    rest = responses - np.average(responses, axis=0, weights=share) - scaled @ weights
    np.testing.assert_allclose(
        standard.model(jnp.asarray(weights)), share @ np.sum(rest**2, axis=1) / 2
    )
    coefficients, level = standard.undo(jnp.asarray(weights))
    np.testing.assert_allclose(
        design @ np.asarray(coefficients) + np.asarray(level),
        responses - rest,
        rtol=1e-9,
    )
    many, levels = standard.undo(jnp.stack([jnp.asarray(weights)] * 2))
    np.testing.assert_allclose(many[1], coefficients)
    np.testing.assert_allclose(levels[1], level)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_path_over_features_against_enumeration(seed):
    design, responses, _ = data(seed)
    standard = recovery.regression(jnp.asarray(design), jnp.asarray(responses))
    found = recovery.path(
        standard.model, standard.model.center, 4, groups=standard.groups()
    )
    centered = responses - responses.mean(axis=0)
    parts = design - design.mean(axis=0)
    for k, objective in zip(range(1, 5), found.objective, strict=True):
        best = min(
            np.linalg.lstsq(parts[:, kept], centered, rcond=None)[1].sum() / 2
            for kept in itertools.combinations(range(SIZE), k)
        )
        np.testing.assert_allclose(objective, best, rtol=1e-9)
    np.testing.assert_array_equal(found.kept, [1, 2, 3, 4])
    whole = np.asarray(found.mask)
    np.testing.assert_array_equal(whole.any(axis=2), whole.all(axis=2))
    # Every weight of a group is paid for, every group is a choice.
    count = ROWS * OUTPUTS
    choice = recovery.information_criterion(found, count, "bic", width=OUTPUTS)
    deviance = count * np.log(2 * np.asarray(found.objective) / count)
    price = OUTPUTS * np.arange(1, 5) * np.log(count)
    np.testing.assert_allclose(choice.values, deviance + price, rtol=1e-9)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda X, y: (X.at[3, 2].set(jnp.nan), y), r"1 NaN.*1 of 6 columns.*\[2\]"),
        (lambda X, y: (BCOO.fromdense(X.at[3, 2].set(jnp.inf)), y), r"columns.*\[2\]"),
        (lambda X, y: (X, y.at[7].set(jnp.nan)), r"1 of 40 examples.*\[7\]"),
        (lambda X, y: (X, y[:5]), r"\(40, 6\) and \(5,"),
        (lambda X, y: (X, y[:, :, None]), "response"),
    ],
)
def test_data_that_are_not_as_they_should_be(spoil, words):
    design, responses, _ = data()
    with pytest.raises(ValueError, match=words):
        recovery.regression(*spoil(jnp.asarray(design), jnp.asarray(responses)))


def test_integers_are_refused_with_the_conversion():
    design, responses, _ = data()
    with pytest.raises(TypeError, match="convert it to float"):
        recovery.regression(jnp.asarray(design.astype(int)), jnp.asarray(responses))


def test_a_ridge_with_groups_belongs_into_the_loss():
    design, responses, _ = data()
    standard = recovery.regression(jnp.asarray(design), jnp.asarray(responses))
    with pytest.raises(ValueError, match="ridge"):
        recovery.path(
            standard.model,
            standard.model.center,
            2,
            l2=1.0,
            groups=standard.groups(),
        )
