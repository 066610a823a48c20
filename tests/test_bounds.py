"""Bounds of the weights: against SciPy on every support, and optimality conditions."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import lsq_linear, minimize, nnls

import sparserec as sr
from sparserec.solvers import _box

ROWS, SIZE, KEPT = 30, 8, 3
BOXES = {"positive": (0.0, np.inf), "narrow": (-0.5, 0.5), "skewed": (-0.2, 1.5)}
FAMILY = ("htp", "subspace_pursuit", "cosamp", "grasp", "splicing", "omp", "foba")


def data(seed=0, correlation=0.5, noise=0.5):
    rng = np.random.default_rng(seed)
    design = rng.normal(size=(ROWS, SIZE))
    for j in range(1, SIZE):
        design[:, j] += correlation * design[:, j - 1]
    weights = np.zeros(SIZE)
    weights[[1, 4, 6]] = [1.0, -1.0, 0.6]
    return design, design @ weights + noise * rng.normal(size=ROWS)


def model_of(design, response):
    return sr.quadratic.least_squares(jnp.asarray(design), jnp.asarray(response))


def within(design, response, kept, box):
    """The best values on a support, by SciPy."""
    if not kept:
        return response @ response / 2, np.zeros(0)
    part = design[:, list(kept)]
    if box == (0.0, np.inf):
        weights, length = nnls(part, response)
        return length**2 / 2, weights
    found = lsq_linear(part, response, box, method="bvls")
    return found.cost, found.x


def best_of_all(design, response, k, box):
    supports = itertools.combinations(range(SIZE), k)
    return min(within(design, response, kept, box)[0] for kept in supports)


@functools.cache
def solved(name, box, seed, **options):
    low, high = BOXES[box]
    solve = getattr(sr, name)
    return solve(
        model_of(*data(seed)), jnp.zeros(SIZE), KEPT, lower=low, upper=high, **options
    )


# --- the projection ------------------------------------------------------------------


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_nearest_sparse_point_of_a_box(box):
    rng = np.random.default_rng(0)
    for _ in range(40):
        point, bend = rng.normal(size=6), rng.uniform(0.5, 2, 6)
        bounds = _box.make_box(box[0], box[1], jnp.zeros(6), sr.matrices)
        worth = _box.worth(bounds, jnp.asarray(point), jnp.asarray(bend))
        kept = np.argsort(-np.asarray(worth))[:2]
        distances = {}
        for pair in itertools.combinations(range(6), 2):
            clipped = np.zeros(6)
            clipped[list(pair)] = np.clip(point[list(pair)], *box)
            distances[pair] = bend @ (point - clipped) ** 2
        mine = distances[(min(kept), max(kept))]
        np.testing.assert_allclose(mine, min(distances.values()), rtol=1e-12)
        sizes = np.asarray(_box.magnitudes(bounds, jnp.asarray(point)))
        equal = _box.worth(bounds, jnp.asarray(point), jnp.ones(6))
        np.testing.assert_allclose(sizes**2, equal, atol=1e-12)


# --- values on a support -------------------------------------------------------------


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize(
    "name",
    [
        "iht",
        "splicing",
        "l0cd",
        pytest.param("htp", marks=pytest.mark.slow),
        pytest.param("omp", marks=pytest.mark.slow),
    ],
)
def test_values_are_optimal_on_the_support(name, box):
    design, response = data(1)
    solution = solved(name, box, 1)
    low, high = BOXES[box]
    weights, mask = np.asarray(solution.params), np.asarray(solution.mask)
    assert solution.converged
    assert mask.sum() <= KEPT
    assert np.all((weights >= low) & (weights <= high))
    assert not weights[~mask].any()
    value, _ = within(design, response, tuple(np.flatnonzero(mask)), BOXES[box])
    np.testing.assert_allclose(solution.objective, value, rtol=1e-7)
    # The gradient vanishes inside, and points out of the box at a bound.
    slope = (design @ weights - response) @ design
    scale = np.abs(response @ design).max()
    inside = mask & (weights > low) & (weights < high)
    assert np.all(np.abs(slope[inside]) <= 1e-5 * scale)
    assert np.all(slope[mask & (weights == low)] >= -1e-5 * scale)
    assert np.all(slope[mask & (weights == high)] <= 1e-5 * scale)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_many_bounds_on_hard_columns(seed):
    rng = np.random.default_rng(seed)
    rows, size = (60, 40) if seed % 2 else (30, 40)  # more columns than rows, too
    design = rng.normal(size=(rows, size))
    for j in range(1, size):
        design[:, j] += (0.5, 0.9, 0.99, 2.0)[seed % 4] * design[:, j - 1]
    design /= np.linalg.norm(design, axis=0)
    response = design @ rng.normal(size=size) + 0.3 * rng.normal(size=rows)
    low, high = (0.0, np.inf) if seed % 3 else (-0.3, 0.2)
    solution = sr.htp(
        model_of(design, response), jnp.zeros(size), size, lower=low, upper=high
    )
    plain = lsq_linear(design, response, (low, high), method="bvls", max_iter=1000)
    np.testing.assert_allclose(solution.objective, plain.cost, rtol=1e-8)


def log_loss(weights, design, labels):
    eta = design @ weights
    return jnp.sum(jax.nn.softplus(eta) - labels * eta)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["iht", "splicing", "omp", "l0cd"])
def test_a_loss_against_every_support(name):
    design, response = data(2)
    labels = (response > 0.2).astype(float)
    args = (jnp.asarray(design), jnp.asarray(labels))
    solution = getattr(sr, name)(
        log_loss, jnp.zeros(SIZE), 2, args=args, lower=-0.4, upper=0.9
    )

    def value(weights, part):
        eta = part @ weights
        slope = (1 / (1 + np.exp(-eta)) - labels) @ part
        return np.sum(np.logaddexp(0, eta) - labels * eta), slope

    best = min(
        minimize(
            value,
            np.zeros(2),
            args=(design[:, list(pair)],),
            jac=True,
            bounds=[(-0.4, 0.9)] * 2,
            tol=1e-12,
        ).fun
        for pair in itertools.combinations(range(SIZE), 2)
    )
    np.testing.assert_allclose(solution.objective, best, rtol=1e-6)


# --- the support ---------------------------------------------------------------------


@pytest.mark.parametrize("box", BOXES)
def test_exchanges_find_the_best_of_all_supports(box):
    for seed in range(8):
        best = best_of_all(*data(seed), KEPT, BOXES[box])
        np.testing.assert_allclose(solved("l0cd", box, seed).objective, best, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILY)
def test_the_family_is_seldom_far_from_it(name):
    found = [
        (float(solved(name, box, s).objective), best_of_all(*data(s), KEPT, pair))
        for box, pair in BOXES.items()
        for s in range(8)
    ]
    assert np.mean([value <= best * (1 + 1e-9) for value, best in found]) >= 0.7
    assert max(value / best for value, best in found) < 1.5


@pytest.mark.slow
@pytest.mark.parametrize("box", ["positive", "narrow"])
def test_a_path_within_bounds(box):
    low, high = BOXES[box]
    design, response = data(3, correlation=1.2)
    path = sr.recovery.path(
        model_of(design, response), jnp.zeros(SIZE), 5, lower=low, upper=high
    )
    best = [best_of_all(design, response, k, BOXES[box]) for k in range(1, 6)]
    np.testing.assert_allclose(path.objective, best, rtol=1e-9)
    assert np.all(np.asarray(path.params) >= low)
    assert np.all(np.asarray(path.params) <= high)
    np.testing.assert_array_equal(path.kept, np.asarray(path.mask).sum(axis=1))


@pytest.mark.slow
def test_a_penalty_within_bounds():
    design, response = data(4)
    penalty, model = 0.8, model_of(design, response)
    solution = sr.l0cd(model, jnp.zeros(SIZE), SIZE, penalty=penalty, lower=0.0)
    best = min(
        best_of_all(design, response, k, (0.0, np.inf)) + k * penalty
        for k in range(SIZE + 1)
    )
    np.testing.assert_allclose(solution.objective, best, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["cyclic", "greedy"])
def test_coordinate_descent_ends_where_no_weight_can_move(order):
    design, response = data(5)
    gram, linear = design.T @ design, design.T @ response
    solution: Any = sr.l0cd(
        model_of(design, response),
        jnp.zeros(SIZE),
        KEPT,
        l1=0.3,
        order=order,
        lower=-0.5,
        upper=0.4,
    )
    weights = np.asarray(solution.params)

    def value(w):
        return w @ gram @ w / 2 - linear @ w + 0.3 * np.abs(w).sum()

    for j in np.flatnonzero(weights):
        for other in np.linspace(-0.5, 0.4, 91):
            moved = np.where(np.arange(SIZE) == j, other, weights)
            assert value(weights) <= value(moved) + 1e-9


# --- always in, groups, tracing ------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["iht", "splicing", "l0cd"])
def test_weights_always_in_may_exclude_zero(name):
    design, response = data(6)
    part = {"free": jnp.zeros(SIZE - 1), "level": jnp.zeros(1)}

    def loss(params, rows, target):
        return sr.losses.squared(
            rows @ jnp.concatenate([params["free"], params["level"]]), target
        )

    solution = getattr(sr, name)(
        loss,
        part,
        2,
        args=(jnp.asarray(design), jnp.asarray(response)),
        lower={"free": 0.0, "level": 0.4},
        upper={"free": np.inf, "level": 0.7},
        prunable={"free": True, "level": False},
    )
    bounds = (np.array([0.0, 0.0, 0.4]), np.array([np.inf, np.inf, 0.7]))
    best = min(
        lsq_linear(design[:, [*pair, SIZE - 1]], response, bounds, method="bvls").cost
        for pair in itertools.combinations(range(SIZE - 1), 2)
    )
    np.testing.assert_allclose(solution.objective, best / ROWS, rtol=1e-6)
    assert 0.4 <= solution.params["level"][0] <= 0.7


@pytest.mark.slow
def test_groups_within_bounds():
    design, response = data(7)
    labels = np.arange(SIZE) % 4
    solution = sr.splicing(
        model_of(design, response), jnp.zeros(SIZE), 2, groups=labels, lower=0.0
    )
    best = min(
        nnls(design[:, np.isin(labels, pair)], response)[1] ** 2 / 2
        for pair in itertools.combinations(range(4), 2)
    )
    np.testing.assert_allclose(solution.objective, best, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["htp", "l0cd"])
def test_bounds_are_traced(name):
    model = model_of(*data(0))
    solve = functools.partial(getattr(sr, name), model, jnp.zeros(SIZE), KEPT)
    limits = jnp.asarray([0.2, 0.5, 10.0])
    together = jax.jit(jax.vmap(lambda u: solve(lower=-u, upper=u)))(limits)
    for i, limit in enumerate(limits):
        alone = solve(lower=-limit, upper=limit)
        np.testing.assert_allclose(together.objective[i], alone.objective, rtol=1e-9)
        assert np.abs(together.params[i]).max() <= limit
    unbounded = solve()
    np.testing.assert_allclose(together.objective[2], unbounded.objective, rtol=1e-9)


# --- what is refused -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["iht", "htp", "omp", "l0cd"])
@pytest.mark.parametrize(
    ("bounds", "error", "words"),
    [
        ({"lower": 1.0, "upper": 0.0}, ValueError, "above `upper`.*8 of 8.*number 0"),
        ({"lower": 0.5}, ValueError, "zero lies outside.*0.5"),
        ({"upper": np.r_[np.ones(7), -1.0]}, ValueError, "1 of 8.*number 7"),
        ({"lower": np.nan}, ValueError, "NaN"),
        ({"lower": np.zeros(3)}, ValueError, r"\(3,\)"),
        ({"upper": {"a": 1.0}}, ValueError, "pytree"),
        ({"upper": True}, TypeError, "real numbers"),
        ({"upper": "high"}, TypeError, "real numbers"),
    ],
)
def test_wrong_bounds(name, bounds, error, words):
    with pytest.raises(error, match=words):
        getattr(sr, name)(model_of(*data()), jnp.zeros(SIZE), KEPT, **bounds)


def test_a_ridge_that_bounds_do_not_take_apart():
    design, response = data()
    args = (jnp.asarray(design), jnp.asarray(response > 0, float))
    with pytest.raises(ValueError, match="quadratic model"):
        sr.l0cd(log_loss, jnp.zeros(SIZE), 2, args=args, lower=0.0, l2=1.0)
    with pytest.raises(ValueError, match="ridge"):
        sr.recovery.path(log_loss, jnp.zeros(SIZE), 2, args=args, lower=0.0, l2=1.0)


@pytest.mark.parametrize("box", BOXES)
def test_certificate_within_bounds_against_scipy(box):
    design, response = data(1)
    limits = BOXES[box]
    model = model_of(design, response)
    start = sr.htp(model, jnp.zeros(SIZE), KEPT, lower=limits[0], upper=limits[1])
    # A support that is not the best one: there is something to gain.
    worse = jnp.asarray(np.isin(np.arange(SIZE), [0, 3, 5]))
    for mask in (start.mask, worse):
        kept = set(np.flatnonzero(mask).tolist())
        now, weights = within(design, response, sorted(kept), limits)
        params = jnp.zeros(SIZE).at[jnp.asarray(sorted(kept))].set(weights)
        solution = start._replace(params=params, mask=mask)
        report = sr.certificate(model, solution, KEPT, lower=limits[0], upper=limits[1])
        neighbors = [kept - {i} for i in kept]
        neighbors += [kept - {i} | {j} for i in kept for j in set(range(SIZE)) - kept]
        if len(kept) < KEPT:
            neighbors += [kept | {j} for j in set(range(SIZE)) - kept]
        values = [within(design, response, sorted(x), limits)[0] for x in neighbors]
        np.testing.assert_allclose(report.gain, now - min(values), atol=1e-5)
        taken = kept - {int(report.leaving)}
        taken |= {int(report.entering)} - {-1}
        reached = within(design, response, sorted(taken), limits)[0]
        np.testing.assert_allclose(reached, min(values), atol=1e-5)
        np.testing.assert_allclose(report.refit, 0, atol=1e-5)


def test_the_lower_bound_holds_within_bounds():
    design, response = data(2)
    l2 = 2.0
    stacked = np.vstack([design, np.sqrt(2 * l2) * np.eye(SIZE)])
    padded = np.concatenate([response, np.zeros(SIZE)])
    best = best_of_all(stacked, padded, KEPT, (0.0, np.inf))
    bound = sr.recovery.lower_bound(model_of(design, response), KEPT, l2=l2)
    assert 0 < float(bound.value) <= best * (1 + 1e-5)
