"""Losses: against other packages, and as examples against all supports."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.optimize
import scipy.stats
from sklearn.metrics import log_loss

import sparserec
from sparserec import losses

ROWS, SIZE, KEPT = 80, 6, 2


def instance(seed=0, size=SIZE):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(ROWS, size))
    inputs[:, 1:] += 0.5 * inputs[:, :-1]
    return rng, inputs


# --- values --------------------------------------------------------------------------


def weighted(values, weights):
    return np.average(values, weights=weights)


def test_values_are_those_of_other_packages():
    rng, scores = instance(size=3)
    one = jnp.asarray(scores[:, 0])
    weights = rng.uniform(0.5, 2, ROWS)
    share = jnp.asarray(weights)
    targets = rng.normal(size=ROWS)
    labels = rng.integers(0, 2, ROWS)
    chances = 1 / (1 + np.exp(-scores[:, 0]))
    np.testing.assert_allclose(
        losses.logistic(one, jnp.asarray(labels), share),
        log_loss(labels, chances, sample_weight=weights),
    )
    classes = rng.integers(0, 3, ROWS)
    likely = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(
        losses.multinomial(jnp.asarray(scores), jnp.asarray(classes), share),
        log_loss(classes, likely, sample_weight=weights),
    )
    counts = rng.poisson(2.0, ROWS)
    constant = weighted(scipy.special.gammaln(counts + 1), weights)
    np.testing.assert_allclose(
        losses.poisson(one, jnp.asarray(counts), share) + constant,
        -weighted(scipy.stats.poisson.logpmf(counts, np.exp(scores[:, 0])), weights),
    )
    np.testing.assert_allclose(
        losses.huber(one, jnp.asarray(targets), 0.7, share),
        weighted(scipy.special.huber(0.7, scores[:, 0] - targets), weights),
    )
    np.testing.assert_allclose(
        losses.squared(one, jnp.asarray(targets), share),
        weighted((scores[:, 0] - targets) ** 2 / 2, weights),
    )


def slow_cox(scores, times, events, weights):
    total = 0.0
    for i in np.flatnonzero(events):
        at_risk = times >= times[i]
        hazard = np.sum(weights[at_risk] * np.exp(scores[at_risk]))
        total -= weights[i] * (scores[i] - np.log(hazard))
    return total / weights.sum()


def test_partial_likelihood_with_ties_and_weights():
    rng, scores = instance(size=1)
    times = rng.integers(1, 20, ROWS).astype(float)
    events = rng.integers(0, 2, ROWS)
    for weights in (np.ones(ROWS), rng.integers(0, 3, ROWS).astype(float)):
        value, slope = jax.value_and_grad(losses.cox)(
            jnp.asarray(scores[:, 0]),
            jnp.asarray(times),
            jnp.asarray(events),
            jnp.asarray(weights),
        )
        expected = slow_cox(scores[:, 0], times, events, weights)
        np.testing.assert_allclose(value, expected)
        assert np.all(np.isfinite(slope))
        np.testing.assert_allclose(np.sum(slope), 0, atol=1e-12)
    np.testing.assert_allclose(
        losses.cox(jnp.asarray(scores[:, 0]), jnp.asarray(times), jnp.asarray(events)),
        slow_cox(scores[:, 0], times, events, np.ones(ROWS)),
    )


def test_weights_that_count_are_repetitions():
    rng, scores = instance(size=1)
    counts = rng.integers(0, 3, ROWS)
    one, labels = scores[:, 0], rng.integers(0, 2, ROWS)
    np.testing.assert_allclose(
        losses.logistic(jnp.asarray(one), jnp.asarray(labels), jnp.asarray(counts)),
        losses.logistic(
            jnp.asarray(np.repeat(one, counts)), jnp.asarray(np.repeat(labels, counts))
        ),
    )


def test_shapes_that_would_broadcast_are_refused():
    column, row = jnp.zeros((5, 1)), jnp.zeros(5)
    for loss in (losses.squared, losses.logistic, losses.poisson, losses.huber):
        with pytest.raises(ValueError, match=r"\(5, 1\) and \(5,\)"):
            loss(column, row)
    with pytest.raises(ValueError, match="every example with every other"):
        losses.cox(row, jnp.zeros(4), row)
    with pytest.raises(ValueError, match="weights"):
        losses.squared(row, row, jnp.zeros(4))
    with pytest.raises(TypeError, match="integers from 0"):
        losses.multinomial(column, row)


# --- examples: the best of all supports ----------------------------------------------


def best_support(loss, args, size, k, groups=None):
    """Every support refitted by SciPy."""
    groups = np.arange(size) if groups is None else groups
    value_and_slope = jax.jit(jax.value_and_grad(loss))
    candidates = []
    for kept in oracles.all_masks(groups.max() + 1, k):
        mask = kept[groups]

        def function(values, mask=mask):
            point = np.zeros(size)
            point[mask] = values
            value, slope = value_and_slope(jnp.asarray(point), *args)
            return float(value), np.asarray(slope)[mask]

        found = scipy.optimize.minimize(
            function, np.zeros(mask.sum()), jac=True, method="BFGS", tol=1e-7
        )
        weights = np.zeros(size)
        weights[mask] = found.x
        candidates.append(oracles.Sparse(mask, weights, found.fun))
    return min(candidates, key=lambda candidate: candidate.value)


def linear(loss, params, inputs, *targets):
    return loss(inputs @ params, *targets)


def trend(params, targets):
    return losses.squared(jnp.cumsum(params), targets)


def ising(couplings, spins):
    """Pseudo-likelihood of spins, each given the others."""
    width = spins.shape[1]
    row, column = np.triu_indices(width, 1)
    matrix = jnp.zeros((width, width)).at[row, column].set(couplings)
    fields = spins @ (matrix + matrix.T)
    return losses.logistic(2 * fields, (spins + 1) / 2)


def classes(params, inputs, labels):
    return losses.multinomial(inputs @ params.reshape(SIZE, 3), labels)


def logistic_example():
    rng, inputs = instance(1)
    scores = inputs[:, [1, 4]] @ [1.5, -1.5]
    labels = (rng.uniform(size=ROWS) < 1 / (1 + np.exp(-scores))).astype(float)
    return functools.partial(linear, losses.logistic), (inputs, labels), SIZE, None


def poisson_example():
    rng, inputs = instance(2)
    counts = rng.poisson(np.exp(inputs[:, [0, 3]] @ [0.6, -0.8]))
    return functools.partial(linear, losses.poisson), (inputs, counts), SIZE, None


def huber_example():
    rng, inputs = instance(3)
    targets = inputs[:, [2, 5]] @ [2.0, 1.0] + 0.3 * rng.standard_cauchy(ROWS)
    return functools.partial(linear, losses.huber), (inputs, targets), SIZE, None


def cox_example():
    rng, inputs = instance(4)
    times = rng.exponential(np.exp(-inputs[:, [1, 2]] @ [1.0, -1.0]))
    events = times < 2
    args = (inputs, np.minimum(times, 2), events)
    return functools.partial(linear, losses.cox), args, SIZE, None


def multinomial_example():
    rng, inputs = instance(5)
    weights = np.zeros((SIZE, 3))
    weights[[0, 4]] = [[2, -1, -1], [-1, 2, -1]]
    labels = np.argmax(inputs @ weights + rng.gumbel(size=(ROWS, 3)), axis=1)
    return classes, (inputs, labels), 3 * SIZE, np.repeat(np.arange(SIZE), 3)


def trend_example():
    rng = np.random.default_rng(6)
    steps = np.where(np.arange(12) >= 4, 2.0, 0.0) - np.where(np.arange(12) >= 9, 3, 0)
    return trend, (steps + 0.2 * rng.normal(size=12),), 12, None


def ising_example():
    rng = np.random.default_rng(7)
    spins = rng.choice([-1.0, 1.0], size=(200, 5))
    spins[:, 3] = np.where(rng.uniform(size=200) < 0.8, spins[:, 0], -spins[:, 0])
    spins[:, 4] = np.where(rng.uniform(size=200) < 0.3, spins[:, 1], -spins[:, 1])
    return ising, (spins,), 10, None


EXAMPLES = {
    "logistic": logistic_example,
    "poisson": poisson_example,
    "huber": huber_example,
    "cox": cox_example,
    "multinomial": multinomial_example,
    "trend": trend_example,
    "ising": ising_example,
}
QUICK = {("cox", "splicing"), ("multinomial", "omp")}


@pytest.mark.parametrize(
    ("example", "solver"),
    [
        pytest.param(
            e, s, marks=() if (e, s) in QUICK else pytest.mark.slow, id=f"{e}-{s}"
        )
        for e in EXAMPLES
        for s in ("htp", "grasp", "splicing", "omp", "foba")
    ],
)
def test_best_of_all_supports(example, solver):
    loss, arrays, size, groups = EXAMPLES[example]()
    args = tuple(jnp.asarray(x) for x in arrays)
    expected = best_support(loss, args, size, KEPT, groups)
    solution = getattr(sparserec, solver)(
        loss, jnp.zeros(size), KEPT, args=args, groups=groups
    )
    assert solution.converged
    np.testing.assert_array_equal(solution.mask, expected.mask)
    np.testing.assert_allclose(solution.objective, expected.value, rtol=1e-8)
    if groups is None:  # else a constant may be added to all classes
        np.testing.assert_allclose(solution.params, expected.params, atol=1e-4)
