"""The pursuit family: against slow versions of the same algorithms, and theorems."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import sparserec
from sparserec import Status, quadratic
from sparserec._run import _run_compiled

ROWS, SIZE, KEPT = 60, 40, 4  # one set of shapes: compilation is most of the time here

gain = functools.partial(sparserec.omp, rule="gain")
SOLVERS = {
    "htp": sparserec.htp,
    "splicing": sparserec.splicing,
    "omp": sparserec.omp,
    "omp, gain": gain,
    "subspace_pursuit": sparserec.subspace_pursuit,
    "cosamp": sparserec.cosamp,
    "grasp": sparserec.grasp,
    "foba": sparserec.foba,
}
QUICK = ("htp", "splicing", "omp", "omp, gain")


def some(*quick):
    """All solvers, of which only these in a quick run."""
    return pytest.mark.parametrize(
        "name",
        [
            pytest.param(name, marks=() if name in quick else pytest.mark.slow)
            for name in SOLVERS
        ],
    )


every = some(*QUICK)


def regression(seed=0, correlation=0.7, noise=0.5, k=KEPT):
    rng = np.random.default_rng(seed)
    design = rng.normal(size=(ROWS, SIZE))
    for j in range(1, SIZE):
        design[:, j] = correlation * design[:, j - 1] + design[:, j]
    design *= rng.uniform(0.3, 3, SIZE)
    weights = np.zeros(SIZE)
    weights[rng.choice(SIZE, k, replace=False)] = rng.choice([-1.0, 1.0], k)
    return design, design @ weights + noise * rng.normal(size=ROWS), weights


def model_of(design, response, dtype: Any = np.float64):
    return quadratic.least_squares(
        jnp.asarray(design, dtype), jnp.asarray(response, dtype)
    )


def solve(name, design, response, k=KEPT, start=None, **options):
    start = jnp.zeros(SIZE) if start is None else jnp.asarray(start)
    return SOLVERS[name](model_of(design, response), start, k, **options)


def support(solution):
    return np.flatnonzero(np.asarray(solution.mask)).tolist()


# --- the algorithms again, slowly ----------------------------------------------------


class Slow:
    """The family on a dense quadratic, one solve and one set after another."""

    def __init__(self, design, response):
        self.hessian, self.linear = design.T @ design, response @ design
        self.diagonal = np.diag(self.hessian)

    def refit(self, mask):
        return oracles.minimize_on(self.hessian, self.linear, mask)

    def value(self, weights):
        return oracles.quadratic_value(self.hessian, self.linear, weights)

    def gains(self, weights):
        return (self.hessian @ weights - self.linear) ** 2 / self.diagonal

    def exchange(self, propose, k):
        mask, refused = np.zeros(SIZE, bool), 0
        weights = np.zeros(SIZE)
        while refused <= 10:
            new = propose(mask, weights, k, refused)
            if np.array_equal(new, mask):
                break
            if self.value(self.refit(new)) < self.value(weights) or mask.sum() < k:
                mask, weights, refused = new, self.refit(new), 0
            else:
                refused += 1
        return mask

    def htp(self, mask, weights, k, refused):
        del mask
        gradient = self.hessian @ weights - self.linear
        point = weights - 0.5**refused * gradient / self.diagonal
        return oracles.top_k_mask(self.diagonal * point**2, k)

    def merge(self, times, mask, weights, k, refused):
        outside = np.where(mask, 0, self.gains(weights))
        merged = mask | oracles.top_k_mask(outside, (times * k) >> refused)
        return oracles.top_k_mask(self.diagonal * self.refit(merged) ** 2, k)

    def splice(self, mask, weights, k, refused):
        size = min(5, k) >> refused if mask.sum() == k else k
        losses = np.where(mask, self.diagonal * weights**2, np.inf)
        outside = np.where(mask, -1, self.gains(weights))
        new = mask.copy()
        new[np.argsort(losses)[: min(size, mask.sum())]] = False
        new[np.argsort(-outside)[:size]] = True
        return new

    def omp(self, k):
        mask = np.zeros(SIZE, bool)
        for _ in range(k):
            gains = self.gains(self.refit(mask))
            mask[np.argmax(np.where(mask, -1, gains))] = True
        return mask

    def forward(self, k):
        mask = np.zeros(SIZE, bool)
        for _ in range(k):
            values = np.full(SIZE, np.inf)
            for j in np.flatnonzero(~mask):
                trial = mask.copy()
                trial[j] = True
                values[j] = self.value(self.refit(trial))
            mask[np.argmin(values)] = True
        return mask

    def foba(self, k, share=0.5):
        mask, gained = np.zeros(SIZE, bool), {}
        while True:
            weights, size = self.refit(mask), mask.sum()
            if size:
                cost = np.full(SIZE, np.inf)
                for j in np.flatnonzero(mask):
                    without = np.where(np.arange(SIZE) == j, 0, weights)
                    cost[j] = self.value(without) - self.value(weights)
                if cost.min() < share * gained[size]:
                    mask[np.argmin(cost)] = False
                    continue
            if size == k:
                return mask
            mask[np.argmax(np.where(mask, -1, self.gains(weights)))] = True
            gained[size + 1] = self.value(weights) - self.value(self.refit(mask))

    def solve(self, name, k):
        proposals = {
            "htp": self.htp,
            "splicing": self.splice,
            "subspace_pursuit": functools.partial(self.merge, 1),
            "cosamp": functools.partial(self.merge, 2),
            "grasp": functools.partial(self.merge, 2),
        }
        if name in proposals:
            return self.exchange(proposals[name], k)
        return {"omp": self.omp, "omp, gain": self.forward, "foba": self.foba}[name](k)


@every
@pytest.mark.parametrize("seed", range(6))
def test_slow_version_of_the_same(name, seed):
    design, response, _ = regression(seed, correlation=0.9)
    slow = Slow(design, response)
    for k in (1, 3, 5):
        solution = solve(name, design, response, k)
        mask = slow.solve(name, k)
        assert support(solution) == np.flatnonzero(mask).tolist()
        np.testing.assert_allclose(solution.params, slow.refit(mask), atol=1e-8)
        assert solution.status == Status.CONVERGED


def test_slow_versions_differ():
    # The test above would say little if all designs were easy.
    answers = []
    for seed in range(6):
        slow = Slow(*regression(seed, correlation=0.9)[:2])
        answers.append({slow.solve(name, 5).tobytes() for name in SOLVERS})
    assert max(len(found) for found in answers) >= 4


# --- theorems ------------------------------------------------------------------------


@every
def test_orthonormal_columns_give_the_largest_correlations(name):
    rng = np.random.default_rng(0)
    design = np.linalg.qr(rng.normal(size=(ROWS, SIZE)))[0]
    response = rng.normal(size=ROWS)
    solution = solve(name, design, response, 5)
    correlations = response @ design
    np.testing.assert_array_equal(solution.mask, oracles.top_k_mask(correlations, 5))
    np.testing.assert_allclose(
        solution.params, oracles.hard_threshold(correlations, 5), atol=1e-12
    )


def incoherent(k):
    """A unit-norm design whose coherence is below 1 / (2k - 1)."""
    rng = np.random.default_rng(1)
    basis = np.linalg.qr(rng.normal(size=(ROWS, SIZE)))[0]
    design = basis + 0.02 * rng.normal(size=(ROWS, SIZE))
    design /= np.linalg.norm(design, axis=0)
    coherence = np.abs(design.T @ design - np.eye(SIZE)).max()
    assert coherence < 1 / (2 * k - 1)
    return design


@every
def test_recovery_under_mutual_incoherence(name):
    # Tropp (2004) proves it for OMP, whatever the values; the others do it here too.
    k = 3
    design = incoherent(k)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        weights = np.zeros(SIZE)
        weights[rng.choice(SIZE, k, replace=False)] = rng.normal(size=k) * 10.0 ** (
            rng.integers(-2, 3, k)
        )
        solution = solve(name, design, design @ weights, k)
        np.testing.assert_array_equal(solution.mask, weights != 0)
        np.testing.assert_allclose(solution.params, weights, rtol=1e-9, atol=1e-9)


@every
def test_units_of_the_response_and_of_columns_do_not_matter(name):
    design, response, _ = regression(2)
    expected = solve(name, design, response)
    for scale in (1e-6, 100.0, 1e8):
        other = solve(name, design, scale * response)
        np.testing.assert_array_equal(other.mask, expected.mask)
        np.testing.assert_allclose(other.params, scale * expected.params, rtol=1e-8)
    units = 10.0 ** np.random.default_rng(0).integers(-2, 3, SIZE)
    np.testing.assert_array_equal(
        solve(name, design * units, response).mask, expected.mask
    )


# --- edges ---------------------------------------------------------------------------


@every
def test_none_and_all(name):
    design, response, _ = regression(3)
    nothing = solve(name, design, response, 0)
    assert support(nothing) == []
    np.testing.assert_allclose(nothing.objective, response @ response / 2)
    assert nothing.status == Status.CONVERGED


@some()
def test_everything(name):
    design, response, _ = regression(3)
    everything = solve(name, design, response, SIZE)
    assert support(everything) == list(range(SIZE))
    np.testing.assert_allclose(
        everything.params,
        np.linalg.lstsq(design, response, rcond=None)[0],
        atol=1e-6,
    )


@every
def test_ties_go_to_the_lowest_index(name):
    design = np.eye(ROWS, SIZE)
    solution = solve(name, design, np.ones(ROWS), 3)
    assert support(solution) == [0, 1, 2]
    assert solution.status == Status.CONVERGED


@every
def test_duplicate_and_empty_columns(name):
    design, response, _ = regression(4)
    design[:, 7] = design[:, 3]
    design[:, 5] = 0
    solution = solve(name, design, response)
    assert np.all(np.isfinite(solution.params))
    assert not {3, 7} <= set(support(solution))
    assert 5 not in support(solution)


@some("htp", "omp")
def test_more_weights_than_rows_can_tell_apart(name):
    design, response, _ = regression(5)
    solution = solve(name, np.tile(design[:6], (10, 1)), np.tile(response[:6], 10), 5)
    assert np.all(np.isfinite(solution.params))
    assert solution.objective <= response @ response


@every
def test_nan_is_refused(name):
    design, response, _ = regression()
    response[3] = np.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        solve(name, design, response)


def test_start_is_the_first_support():
    design, response, weights = regression(1, noise=0.0)
    cold = solve("splicing", design, response)
    warm = solve("splicing", design, response, start=weights)
    np.testing.assert_array_equal(warm.mask, weights != 0)
    assert warm.iterations == 4  # refused: exchanges of four, two and one
    assert cold.iterations > 4


# --- programs ------------------------------------------------------------------------


@every
def test_one_compilation_for_neighboring_budgets_and_data(name):
    solve(name, *regression()[:2])
    programs = cast(Any, _run_compiled)._cache_size()
    for seed, k in enumerate((0, 1, 2, np.int32(5))):
        solve(name, *regression(seed)[:2], cast(Any, k))
    assert cast(Any, _run_compiled)._cache_size() == programs


@some("splicing")
def test_batch_over_budgets_equals_the_loop(name):
    design, response, _ = regression()
    batch = jax.jit(jax.vmap(lambda k: solve(name, design, response, k)))(jnp.arange(6))
    for k in range(6):
        single = solve(name, design, response, k)
        np.testing.assert_array_equal(batch.mask[k], single.mask)
        np.testing.assert_allclose(batch.params[k], single.params, atol=1e-9)


@some("htp", "omp")
def test_a_sweep_that_knows_its_largest_budget(name):
    design, response, _ = regression()

    def limited(k):
        return solve(name, design, response, k, max_kept=5)

    batch = jax.jit(jax.vmap(limited))(jnp.arange(8))
    for k in range(8):
        # A traced k beyond the largest one counts as that one; nothing is lost.
        single = solve(name, design, response, min(k, 5))
        np.testing.assert_array_equal(batch.mask[k], single.mask)
        np.testing.assert_allclose(batch.params[k], single.params, atol=1e-9)


@pytest.mark.parametrize("name", ["htp", "omp"])
def test_solves_are_as_wide_as_the_largest_budget(name):
    design, response, _ = regression()
    rows = quadratic.LowRank(jnp.asarray(design), jnp.zeros(()))
    model = quadratic.QuadraticModel(
        jnp.zeros(SIZE),
        jnp.asarray(response @ response / 2),
        jnp.asarray(-response @ design),
        rows,
    )

    def wide(max_kept):
        def run(k):
            return SOLVERS[name](model, jnp.zeros(SIZE), k, max_kept=max_kept)

        # Solves on any support are as wide as there are rows.
        return f"f64[{ROWS},{ROWS}]" in str(jax.make_jaxpr(run)(jnp.int32(3)))

    assert wide(None)
    assert not wide(5)


def test_largest_budgets_that_cannot_be():
    design, response, _ = regression()
    with pytest.raises(ValueError, match="below the number to keep, 4"):
        solve("htp", design, response, 4, max_kept=3)
    with pytest.raises(ValueError, match="`max_kept` must be an integer"):
        solve("htp", design, response, 4, max_kept=0)


@some("omp")
def test_single_precision(name):
    design, response, weights = regression(0, noise=0.0)
    model = model_of(design, response, np.float32)
    solution = SOLVERS[name](model, jnp.zeros(SIZE, jnp.float32), KEPT)
    assert solution.params.dtype == jnp.float32
    np.testing.assert_array_equal(solution.mask, weights != 0)
    np.testing.assert_allclose(solution.params, weights, atol=1e-4)


def squares(params, design, response):
    return jnp.sum(jnp.square(design @ params - response)) / 2


@some("htp")
def test_curvature_by_products(name):
    design, response, _ = regression(0)
    norms = np.linalg.norm(design, axis=0)  # the mean stands for every diagonal entry
    design = design / norms
    products = SOLVERS[name](
        squares,
        jnp.zeros(SIZE),
        KEPT,
        args=(jnp.asarray(design), jnp.asarray(response)),
        curvature=quadratic.Hessian(dense_limit=1, cg_steps=40),
    )
    stored = solve(name, design, response)
    np.testing.assert_array_equal(products.mask, stored.mask)
    np.testing.assert_allclose(products.params, stored.params, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["htp", "omp, gain"])
def test_rows_without_a_gram_matrix(name):
    design, response, _ = regression(1)
    expected = solve(name, design, response)
    model = model_of(design, response)
    curvature = quadratic.LowRank(jnp.asarray(design), jnp.zeros(()))
    model = quadratic.QuadraticModel(
        model.center, model.value, model.gradient, curvature
    )
    solution = SOLVERS[name](model, jnp.zeros(SIZE), KEPT)
    np.testing.assert_array_equal(solution.mask, expected.mask)
    np.testing.assert_allclose(solution.params, expected.params, atol=1e-9)


# --- groups --------------------------------------------------------------------------

LABELS = np.random.default_rng(9).permutation(np.repeat(np.arange(10) * 7 - 20, 4))


def best_groups(design, response, labels, k):
    """The best choice of k groups, by trying all of them."""
    slow, found = Slow(design, response), []
    names = np.unique(labels)
    for mask in oracles.all_masks(names.size, k):
        members = np.isin(labels, names[mask])
        weights = slow.refit(members)
        found.append((slow.value(weights), members, weights))
    return min(found, key=lambda item: item[0])


@some("splicing")
def test_scattered_groups_come_and_go_together(name):
    rng = np.random.default_rng(3)
    design = rng.normal(size=(ROWS, SIZE))
    weights = np.where(np.isin(LABELS, [-20, 8, 43]), rng.normal(size=SIZE), 0)
    response = design @ weights + 0.1 * rng.normal(size=ROWS)
    for k in (1, 3):
        _, members, expected = best_groups(design, response, LABELS, k)
        solution = solve(name, design, response, k, groups=LABELS)
        np.testing.assert_array_equal(solution.mask, members)
        np.testing.assert_allclose(solution.params, expected, atol=1e-9)


@some("htp")
def test_groups_of_one_are_no_groups(name):
    design, response, _ = regression(6)
    one = solve(name, design, response, groups=np.arange(SIZE)[::-1])
    np.testing.assert_array_equal(one.mask, solve(name, design, response).mask)


@some("omp")
def test_joint_rows_of_several_responses(name):
    rng = np.random.default_rng(4)
    inputs = rng.normal(size=(ROWS, 10))
    weights = np.zeros((10, 4))
    weights[[2, 7]] = rng.normal(size=(2, 4))
    params = {"bias": jnp.zeros(4), "kernel": jnp.zeros((10, 4))}
    rows = {
        "bias": np.zeros(4, int),
        "kernel": np.broadcast_to(np.arange(10)[:, None], (10, 4)),
    }

    solution = SOLVERS[name](
        affine,
        params,
        2,
        args=(jnp.asarray(inputs), jnp.asarray(inputs @ weights + 3)),
        groups=rows,
    )
    np.testing.assert_array_equal(solution.mask["kernel"], weights != 0)
    np.testing.assert_allclose(solution.params["kernel"], weights, atol=1e-8)
    np.testing.assert_allclose(solution.params["bias"], np.full(4, 3), atol=1e-8)


def affine(params, inputs, targets):
    outputs = inputs @ params["kernel"] + params["bias"][None, :]
    return jnp.mean(jnp.square(outputs - targets))


@pytest.mark.slow
def test_groups_with_budgets_of_their_own():
    rng = np.random.default_rng(5)
    design = rng.normal(size=(ROWS, SIZE))
    weights = np.zeros(SIZE)
    weights[[0, 1, 4, 5, 20, 21]] = 3.0, 3.0, 2.0, 2.0, 1.0, 1.0
    labels = np.arange(SIZE) // 2

    def loss(params, inputs, targets):
        flat = jnp.concatenate([params["first"], params["second"]])
        return squares(flat, inputs, targets)

    params = {"first": jnp.zeros(20), "second": jnp.zeros(20)}
    for solver in (sparserec.splicing, sparserec.omp):
        solution = solver(
            loss,
            params,
            {"first": 1, "second": 2},
            args=(jnp.asarray(design), jnp.asarray(design @ weights)),
            groups={"first": labels[:20], "second": labels[20:]},
        )
        kept = np.concatenate([solution.mask["first"], solution.mask["second"]])
        # The better of the two in the first leaf; one of no use fills the second.
        assert kept[[0, 1, 20, 21]].all()
        assert (kept[:20].sum(), kept[20:].sum()) == (2, 4)
        np.testing.assert_array_equal(kept[::2], kept[1::2])


@pytest.mark.slow
def test_groups_inside_an_outer_program():
    design, response, _ = regression(7)
    expected = solve("htp", design, response, 2, groups=LABELS)
    outer = jax.jit(lambda m: sparserec.htp(m, jnp.zeros(SIZE), 2, groups=LABELS))(
        model_of(design, response)
    )
    np.testing.assert_array_equal(outer.mask, expected.mask)
