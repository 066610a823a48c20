"""What every solver promises, checked for every one of them on one small problem.

Compilation is most of the time here, so the problem has one set of shapes, what
differs between tests is traced (budget, data, damping, where the loss turns NaN), and
answers that several tests look at are computed once.
"""

import functools
import inspect
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import sparserec
from sparserec import Status, _tree, quadratic
from sparserec._run import _run_compiled

PRUNABLE, FREE, EXAMPLES = 8, 1, 16  # weights in the matrix, in the bias
SHAPES = {"bias": (FREE,), "kernel": (2, 4)}
KS = np.arange(PRUNABLE + 1)

# --- the problem ---------------------------------------------------------------------

TRACES = []


def predict(params, inputs, cliff):
    """A linear model that is NaN where the weights are longer than the cliff."""
    TRACES.append(None)
    weights = jnp.concatenate([params["bias"], params["kernel"].reshape(-1)])
    far = jnp.sum(jnp.square(weights)) > cliff
    return jnp.where(far, jnp.nan, inputs @ weights)


# The data are `(inputs, cliff, targets)`: what a Gauss-Newton curvature expects.
gauss_newton = quadratic.gauss_newton(
    predict, quadratic.squared_error, cg_steps=PRUNABLE + FREE, cg_tol=1e-12
)
loss = gauss_newton.loss


class Data(NamedTuple):
    inputs: np.ndarray
    cliff: np.ndarray
    targets: np.ndarray

    @property
    def hessian(self):
        return self.inputs.T @ self.inputs / EXAMPLES

    @property
    def linear(self):
        return self.inputs.T @ self.targets / EXAMPLES

    def value(self, weights):
        return np.sum((self.inputs @ weights - self.targets) ** 2) / (2 * EXAMPLES)


def data(seed=0, condition=1.05) -> Data:
    """Well-conditioned least squares whose weights are well apart."""
    rng = np.random.default_rng(seed)
    dim = PRUNABLE + FREE
    basis, _ = np.linalg.qr(rng.normal(size=(EXAMPLES, dim)))
    turn, _ = np.linalg.qr(rng.normal(size=(dim, dim)))
    inputs = 4 * basis * np.linspace(1, condition**0.5, dim) @ turn
    weights = rng.permutation(np.linspace(1, 3, dim)) * rng.choice([-1, 1], dim)
    targets = inputs @ weights + 0.1 * rng.normal(size=EXAMPLES)
    return Data(inputs, np.full(EXAMPLES, np.inf), targets)


def as_args(problem: Data, dtype: Any = np.float64):
    return tuple(jnp.asarray(x, dtype) for x in problem)


def tree(weights, dtype: Any = np.float64):
    flat = jnp.asarray(weights, dtype)
    return {"bias": flat[:FREE], "kernel": flat[FREE:].reshape(SHAPES["kernel"])}


def flat(params):
    return np.concatenate([np.ravel(np.asarray(x)) for x in jax.tree.leaves(params)])


def dense_weights(problem: Data):
    return np.linalg.solve(problem.hessian, problem.linear)


def projection(weights, k):
    """All but the k largest entries of the matrix set to zero."""
    kept = oracles.hard_threshold(weights[FREE:], k)
    return np.concatenate([weights[:FREE], kept])


def best(problem: Data, k):
    """The best choice of k entries of the matrix, by trying all of them."""
    candidates = []
    for mask in oracles.all_masks(PRUNABLE, k):
        full = np.concatenate([np.ones(FREE, bool), mask])
        weights = oracles.minimize_on(problem.hessian, problem.linear, full)
        candidates.append(oracles.Sparse(full, weights, problem.value(weights)))
    return min(candidates, key=lambda candidate: candidate.value)


# --- the solvers ---------------------------------------------------------------------


class Case(NamedTuple):
    """A solver with its options, and what may be asked of it."""

    solve: Any
    options: dict
    dense_start: bool = False  # else it starts from zero
    refits: bool = True  # the values on the support are optimal
    sweep: tuple = ()  # a traced option, and five values of it
    falls: bool = True  # no step ends at a loss that is not finite
    one_shot: bool = False  # one step, which may end above plain masking
    slow: bool = False  # has a sibling of nearly the same code in the quick run


iht, iobs = sparserec.iht, sparserec.iobs
TOLERANCES = ("tol", (1e-6, 1e-5, 1e-4, 1e-3, 1e-2))
DAMPINGS = (0.0, 0.01, 0.03, 0.1, 0.3)
CASES = {
    "iht": Case(iht, {}, sweep=TOLERANCES),
    "iht, fixed step": Case(
        iht,
        {"step_size": 0.6},
        sweep=("step_size", (0.2, 0.3, 0.4, 0.5, 0.6)),
        falls=False,
    ),
    "iobs": Case(iobs, {}, sweep=TOLERANCES),
    "iobs up": Case(iobs, {"schedule": "up", "stages": 4}, sweep=TOLERANCES),
    "iobs down": Case(
        iobs, {"schedule": "down", "stages": 4}, dense_start=True, sweep=TOLERANCES
    ),
    "iobs, top-k values": Case(
        iobs,
        {"values": "top_k", "damping": 0.1},
        refits=False,
        sweep=("damping", DAMPINGS),
        falls=False,
    ),
    "iobs, fixed damping": Case(iobs, {"damping": 0.1}, sweep=("damping", DAMPINGS)),
    "iobs by products": Case(iobs, {"curvature": gauss_newton}, sweep=TOLERANCES),
    "htp": Case(sparserec.htp, {}, sweep=TOLERANCES),
    "subspace pursuit": Case(
        sparserec.subspace_pursuit, {}, sweep=TOLERANCES, slow=True
    ),
    "cosamp": Case(sparserec.cosamp, {}, sweep=TOLERANCES, slow=True),
    "grasp by products": Case(
        sparserec.grasp, {"curvature": gauss_newton}, sweep=TOLERANCES
    ),
    "splicing": Case(sparserec.splicing, {}, sweep=("damping", DAMPINGS)),
    "omp": Case(sparserec.omp, {}, sweep=TOLERANCES),
    "foba": Case(
        sparserec.foba, {}, sweep=("share", (0.1, 0.3, 0.5, 0.7, 0.9)), slow=True
    ),
    "oba": Case(sparserec.oba, {}, dense_start=True, refits=False, one_shot=True),
    "obd": Case(sparserec.obd, {}, dense_start=True, refits=False, one_shot=True),
    "obs": Case(
        sparserec.obs,
        {},
        dense_start=True,
        sweep=("damping", (0.0, 1e-3, 1e-2, 0.1, 1.0)),
        one_shot=True,
    ),
}
every = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if case.slow else ())
        for name, case in CASES.items()
    ],
)


def mainly(*names):
    """All solvers, of which only these in a quick run: the others compile as long."""
    return pytest.mark.parametrize(
        "name",
        [
            pytest.param(name, marks=() if name in names else pytest.mark.slow)
            for name in CASES
        ],
    )


batched = mainly("iht, fixed step", "iobs", "iobs, top-k values", "obd")


def test_every_solver_is_in_the_table():
    exported = {
        getattr(sparserec, name)
        for name in sparserec.__all__
        if inspect.isfunction(getattr(sparserec, name))
        and list(inspect.signature(getattr(sparserec, name)).parameters)[:3]
        == ["loss_fn", "params", "k"]
    }
    # These keep the contract in files of their own, with what else they promise.
    apart = {sparserec.chita, sparserec.l0cd, sparserec.prune}
    assert exported == {case.solve for case in CASES.values()} | apart


def start(name, problem: Data):
    if CASES[name].dense_start:
        return dense_weights(problem)
    return np.zeros(PRUNABLE + FREE)


def solve(name, k, problem: Data, weights=None, dtype: Any = np.float64, **options):
    """One solve in the given precision, of the params and the data alike."""
    clean = problem._replace(targets=np.nan_to_num(problem.targets))
    weights = start(name, clean) if weights is None else weights
    case = CASES[name]
    wide = np.float64 if dtype == np.float64 else np.float32
    return case.solve(
        loss,
        tree(weights, dtype),
        k,
        args=as_args(problem, wide),
        **{**case.options, **options},
    )


@functools.cache
def path(name, seed=0):
    """Solutions for every budget, one after another."""
    return [solve(name, int(k), data(seed)) for k in KS]


def lane(batch, index):
    return jax.tree.map(lambda x: x[index], batch)


@functools.cache
def batched_path(name, dtype):
    """The same in one batch, in lower precision."""
    problem = data()
    return jax.vmap(lambda k: solve(name, k, problem, dtype=dtype))(jnp.asarray(KS))


def assert_obeys(solution, k, dtype: Any = np.float64):
    """What holds whatever the data: exact counts, exact zeros, shapes, dtypes."""
    for leaf, mask in zip(
        jax.tree.leaves(solution.params), jax.tree.leaves(solution.mask), strict=True
    ):
        assert leaf.shape == mask.shape
        assert leaf.dtype == dtype
        assert mask.dtype == bool
        assert np.all(np.isfinite(np.asarray(leaf, np.float64)))
        assert not np.any(np.asarray(leaf)[~np.asarray(mask)])
    assert {name: x.shape for name, x in solution.params.items()} == SHAPES
    assert np.all(solution.mask["bias"])
    assert int(np.sum(solution.mask["kernel"])) == k


# --- counts, zeros, values -----------------------------------------------------------


@every
def test_counts_zeros_and_shapes(name):
    for k, solution in zip(KS, path(name), strict=True):
        assert_obeys(solution, k)
        assert solution.status == Status.CONVERGED
        assert solution.objective.shape == solution.iterations.shape == ()


@every
def test_objective_is_the_loss_and_not_above_that_of_masking(name):
    problem = data()
    for k, solution in zip(KS, path(name), strict=True):
        np.testing.assert_allclose(
            solution.objective, problem.value(flat(solution.params)), rtol=1e-9
        )
        if not CASES[name].one_shot:
            masked = problem.value(projection(start(name, problem), k))
            assert solution.objective <= masked * (1 + 1e-12)


@every
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_best_support_of_all(name, seed):
    case, problem = CASES[name], data(seed)
    for k, solution in zip(KS, path(name, seed), strict=True):
        exact = best(problem, int(k))
        if case.refits:
            np.testing.assert_array_equal(flat(solution.mask), exact.mask)
            np.testing.assert_allclose(flat(solution.params), exact.params, atol=1e-4)
        elif k == PRUNABLE:
            np.testing.assert_allclose(flat(solution.params), exact.params, atol=1e-4)


@every
@pytest.mark.parametrize("level", [1.0, 2.0, 0.3, 1e4])
def test_ties_go_to_the_lowest_index(name, level):
    inputs = np.eye(EXAMPLES, PRUNABLE + FREE) * EXAMPLES**0.5
    targets = np.full(EXAMPLES, level)
    solution = solve(name, 3, Data(inputs, np.full(EXAMPLES, np.inf), targets))
    assert_obeys(solution, 3)
    # Equally good supports must not take turns for ever.
    assert solution.status == Status.CONVERGED
    np.testing.assert_allclose(solution.objective, 12 * level**2 / 32, rtol=1e-6)
    if name != "iobs up":  # it may take another of the equal supports it has tried
        np.testing.assert_array_equal(
            flat(solution.mask), np.arange(PRUNABLE + FREE) < FREE + 3
        )


@every
def test_history_ends_with_the_answer(name):
    solution = path(name)[3]
    steps = int(solution.iterations)
    objectives = np.asarray(solution.history.objective)
    assert np.all(np.isfinite(objectives[:steps]))
    assert np.all(np.isnan(objectives[steps:]))
    assert solution.history.kept[steps - 1] == 3
    final = objectives[:steps][np.asarray(solution.history.kept)[:steps] == 3]
    np.testing.assert_array_equal(final.min(), solution.objective)


# --- what is not finite --------------------------------------------------------------


def with_nan(problem: Data) -> Data:
    targets = problem.targets.copy()
    targets[3] = np.nan
    return problem._replace(targets=targets)


@every
def test_nan_in_the_data_is_refused(name):
    with pytest.raises(ValueError, match=r"NaN or infinite at the starting params"):
        solve(name, 3, with_nan(data()))


@batched
def test_nan_in_the_data_is_a_status_inside_a_program(name):
    # The compiled batch cannot raise; every lane comes back with where it started.
    batch = jax.vmap(lambda k: solve(name, k, with_nan(data()), dtype=np.float32))(
        jnp.asarray(KS)
    )
    for k in KS:
        assert_obeys(lane(batch, k), k, np.float32)
    np.testing.assert_array_equal(batch.status, Status.NONFINITE)
    np.testing.assert_array_equal(batch.iterations, 0)
    with pytest.raises(sparserec.SolveError, match=r"NONFINITE \(lane 0 of 9\)"):
        sparserec.check(batch)


@every
def test_loss_that_turns_nan_on_the_way(name):
    """Every good answer lies beyond the cliff; the best finite iterate comes back."""
    problem = data()
    free = oracles.minimize_on(
        problem.hessian, problem.linear, np.arange(PRUNABLE + FREE) < FREE
    )
    weights = free + 0.01
    cliff = np.full(EXAMPLES, 1.05 * weights @ weights)
    solution = solve(name, 4, problem._replace(cliff=cliff), weights)
    assert_obeys(solution, 4)
    assert np.isfinite(solution.objective)
    if not CASES[name].one_shot:
        masked = problem.value(projection(weights, 4))
        assert solution.objective <= masked * (1 + 1e-12)
    if not CASES[name].falls:
        assert solution.status == Status.NONFINITE


# --- the same everywhere -------------------------------------------------------------


@batched
def test_batch_over_budgets_equals_the_loop_and_single_precision_double(name):
    batch = batched_path(name, np.float32)
    for k, expected in zip(KS, path(name), strict=True):
        solution = lane(batch, k)
        assert_obeys(solution, k, np.float32)
        np.testing.assert_array_equal(flat(solution.mask), flat(expected.mask))
        np.testing.assert_allclose(
            flat(solution.params), flat(expected.params), atol=3e-3
        )
        np.testing.assert_allclose(
            solution.objective, expected.objective, rtol=1e-3, atol=1e-5
        )


@batched
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_solved_in_single(name, dtype):
    batch, single = batched_path(name, dtype), batched_path(name, np.float32)
    for k in KS:
        assert_obeys(lane(batch, k), k, dtype)
    for half, full in zip(
        jax.tree.leaves(batch.params), jax.tree.leaves(single.params), strict=True
    ):
        # Nothing is lost but the last rounding; of the start, too, where it matters.
        tol = 4 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(
            np.asarray(half, np.float32), full, rtol=tol, atol=3e-3
        )
    assert batch.objective.dtype == jnp.float32


@mainly("iht")
def test_inside_an_outer_program(name):
    def outer(k, args, weights):
        return CASES[name].solve(
            loss, tree(weights), k, args=args, **CASES[name].options
        )

    compiled = jax.jit(outer)
    for seed in (0, 1):
        problem = data(seed)
        solution = compiled(4, as_args(problem), jnp.asarray(start(name, problem)))
        expected = path(name, seed)[4]
        np.testing.assert_array_equal(flat(solution.mask), flat(expected.mask))
        np.testing.assert_allclose(
            flat(solution.params), flat(expected.params), rtol=1e-6, atol=1e-6
        )
        assert solution.status == expected.status


def compiled_loops() -> int:
    return cast(Any, _run_compiled)._cache_size()


@every
def test_one_compilation_for_budgets_data_and_options(name):
    solve(name, 3, data())
    traces, programs = len(TRACES), compiled_loops()
    for k in (0, 2, 4, 6, np.int32(8)):
        solve(name, k, data())
    for seed in range(3):
        solve(name, 3, data(seed))
    option, values = CASES[name].sweep or ("k", ())
    for value in values:
        solve(name, 3, data(), **{option: value})
    assert compiled_loops() == programs
    assert len(TRACES) == traces


# --- other shapes --------------------------------------------------------------------


def square_loss(params, target):
    return jnp.sum(jnp.square(params - target)) / 2


ITERATIVE = [name for name, case in CASES.items() if not case.one_shot]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "iht" else pytest.mark.slow)
        for name in ITERATIVE
        if "by products" not in name  # its curvature is that of another model
    ],
)
def test_one_weight_and_one_step(name):
    case = CASES[name]
    options = {**case.options, "max_steps": 1}
    if "stages" in options:
        options["stages"] = 1
    for k in (0, 1):
        solution = case.solve(
            square_loss, jnp.array([2.0]), k, args=(jnp.array([3.0]),), **options
        )
        np.testing.assert_array_equal(solution.mask, [bool(k)])
        assert solution.objective <= (0.5 if k else 4.5)
        assert solution.iterations == 1
        assert solution.history.objective.shape == (1,)
        if k:
            # The first step from elsewhere cannot have met the tolerance.
            assert solution.status == Status.MAX_STEPS
            np.testing.assert_allclose(solution.params, [3.0], atol=0.5)
        else:
            np.testing.assert_array_equal(solution.params, [0.0])


@mainly("iobs down")
def test_budgets_of_leaves_are_respected(name):
    problem = data()
    for kernel, bias in [(5, 1), (3, 0), (0, 1), (8, 0)]:
        k = {"kernel": kernel, "bias": bias}
        solution = solve(name, k, problem, prunable={"kernel": True, "bias": True})
        kept = {leaf: int(jnp.sum(mask)) for leaf, mask in solution.mask.items()}
        assert kept == k
        assert not np.any(flat(solution.params)[~flat(solution.mask)])
        if CASES[name].refits:
            weights = oracles.minimize_on(
                problem.hessian, problem.linear, flat(solution.mask)
            )
            np.testing.assert_allclose(flat(solution.params), weights, atol=1e-4)


@pytest.mark.parametrize("solve_model", [sparserec.obd, sparserec.obs])
def test_params_narrower_than_the_model(solve_model):
    model = quadratic.dense(jnp.diag(jnp.arange(1.0, 5.0)), jnp.ones(4))
    solution = solve_model(model, jnp.ones(4, jnp.float32), 2)
    assert solution.params.dtype == jnp.float32
    np.testing.assert_array_equal(solution.params, [0, 0, 1, 1])


def test_layout_helper_agrees_with_the_package():
    # The tests above lay weights out as the package does.
    weights = np.arange(9.0)
    np.testing.assert_array_equal(_tree.flatten(tree(weights)), weights)
