"""Many budgets and ridges at once, against one solve for each; fewer rows."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from sparserec import Status, quadratic
from sparserec.solvers import _chita_path
from sparserec.solvers._chita_path import chita_path, compress_rows
from sparserec.solvers.chita import chita

ROWS, WEIGHTS = 8, 14
KS, RIDGES = (9, 0, 3, WEIGHTS), (1e-3, 0.1, 2.0)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Compiling is nearly all these tests do; what is compiled stays the same."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def instance(seed=0, rows=ROWS) -> tuple[Any, ...]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, WEIGHTS)) * np.linspace(0.1, 2, rows)[:, None]
    center = rng.normal(size=WEIGHTS)
    model = quadratic.low_rank(
        jnp.asarray(x), jnp.asarray(center), jnp.asarray(x.mean(axis=0)), ridge=0.01
    )
    return model, x, center


def optimum(x, center, ridge, mask):
    hessian = x.T @ x + ridge * np.eye(WEIGHTS)
    return oracles.minimize_on(hessian, hessian @ center - x.mean(axis=0), mask)


def value(x, center, ridge, params):
    step = params - center
    return x.mean(axis=0) @ step + (np.sum((x @ step) ** 2) + ridge * step @ step) / 2


@pytest.mark.parametrize("spectral", [False, True])
def test_every_cell_is_its_own_backsolve(spectral, monkeypatch):
    if spectral:
        monkeypatch.setattr(_chita_path, "_SPECTRAL", 1)
        cast(Any, _chita_path._path).clear_cache()
    model, x, center = instance()
    path = chita_path(model, model.center, KS, RIDGES)
    assert path.params.shape == (len(KS), len(RIDGES), WEIGHTS)
    assert path.objective.shape == (len(KS), len(RIDGES))
    for i, k in enumerate(KS):
        mask = oracles.top_k_mask(center, k)
        for j, ridge in enumerate(RIDGES):
            expected = optimum(x, center, 0.01 + ridge, mask)
            np.testing.assert_array_equal(path.mask[i, j], mask)
            np.testing.assert_allclose(
                path.params[i, j], expected, rtol=1e-6, atol=1e-9
            )
            np.testing.assert_allclose(
                path.objective[i, j],
                value(x, center, 0.01 + ridge, expected),
                rtol=1e-8,
                atol=1e-10,
            )
    assert np.all(np.asarray(path.status) == Status.CONVERGED)
    if spectral:
        cast(Any, _chita_path._path).clear_cache()


def test_budgets_and_ridges_are_traced():
    model, *_ = instance()
    chita_path(model, model.center, jnp.asarray([1, 2, 3, 4]), RIDGES)
    cache_size = cast(Any, _chita_path._path)._cache_size
    before = cache_size()
    chita_path(model, model.center, jnp.asarray([9, 3, 5, 0]), (0.5, 0.0, 3.0))
    assert cache_size() == before


def test_compressed_rows_keep_the_leading_directions():
    model, x, _ = instance()
    whole = cast(Any, compress_rows(model, ROWS)).curvature.rows
    np.testing.assert_allclose(whole.T @ whole, x.T @ x, atol=1e-10)
    few: Any = compress_rows(model, 3)
    spectrum = np.linalg.eigvalsh(x @ x.T)
    lost = np.trace(x.T @ x) - float(jnp.sum(jnp.square(few.curvature.rows)))
    np.testing.assert_allclose(lost, spectrum[:-3].sum(), rtol=1e-9)
    found = chita(few, model.center, 5, variant="bso")
    exact = few.curvature.to_matrix()
    expected = oracles.minimize_on(
        np.asarray(exact),
        np.asarray(exact @ model.center - model.gradient),
        np.asarray(found.mask),
    )
    np.testing.assert_allclose(found.params, expected, rtol=1e-5, atol=1e-8)


def test_bad_input():
    model, _, center = instance()
    diagonal = quadratic.diagonal(jnp.ones(WEIGHTS), jnp.asarray(center))
    with pytest.raises(ValueError, match="LowRank"):
        chita_path(diagonal, model.center, [3])
    with pytest.raises(ValueError, match="at least one"):
        chita_path(model, model.center, [])
    with pytest.raises(ValueError, match=r"\[0, 14\]"):
        chita_path(model, model.center, [15])
    with pytest.raises(ValueError, match=r"\[0, 14\]"):
        chita_path(model, model.center, jnp.asarray([-1]))
    with pytest.raises(TypeError, match="integer"):
        chita_path(model, model.center, cast(Any, [0.5]))
    with pytest.raises(TypeError, match="integers"):
        chita_path(model, model.center, jnp.ones(2))
    with pytest.raises(ValueError, match="ridge"):
        chita_path(model, model.center, [3], -1.0)
    with pytest.raises(ValueError, match=r"\[1, 8\]"):
        compress_rows(model, 9)
    with pytest.raises(ValueError, match="LowRank"):
        compress_rows(diagonal, 2)
