"""Models over gates, elimination at a price, and the joint choice of units."""

import functools
import itertools
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import sparserec
from sparserec import Status, _tree, quadratic, structure
from sparserec.structure._costs import Extent, Part, Term
from sparserec.structure._eliminate import eliminate, units_of
from sparserec.structure._gate_model import gate_model, gate_scores
from sparserec.structure._groups import cost_terms
from sparserec.structure._joint import joint


def predict(params, x):
    """A residual network of two blocks with a normalization in between."""
    h = jnp.tanh(x @ params["in"])
    y = jax.nn.relu(h @ params["up"] + params["bias"][None])
    h = h + y @ params["down"]
    return jax.nn.relu(h @ params["mid"]) @ params["out"]


BUILDER = quadratic.gauss_newton(predict, quadratic.softmax_cross_entropy)


@functools.cache
def problem(examples=40):
    rng = np.random.default_rng(0)
    shapes = {
        "in": (5, 4),
        "up": (4, 6),
        "bias": (6,),
        "down": (6, 4),
        "mid": (4, 5),
        "out": (5, 3),
    }
    params = {n: jnp.asarray(rng.normal(size=s)) for n, s in shapes.items()}
    x = jnp.asarray(rng.normal(size=(examples, 5)))
    labels = jnp.asarray(rng.integers(0, 3, examples))
    groups = structure.groups(predict, params, x)
    return params, groups, (x, labels)


def gated_loss(gates, data):
    params, groups, _ = problem()
    return BUILDER.loss(structure.gate(params, groups, gates), *data)


def matrix_of(model) -> np.ndarray:
    return np.asarray(model.curvature.to_matrix())


def flat(tree):
    return np.concatenate([np.ravel(np.asarray(x)) for x in jax.tree.leaves(tree)])


# --- the model -----------------------------------------------------------------------


def test_rows_of_the_fisher_are_gradients_of_single_examples():
    params, groups, data = problem()
    model = gate_model(BUILDER.loss, params, groups, args=data, batch_size=7)
    start = structure.ones(groups, jnp.float64)
    slope = jax.jit(jax.grad(gated_loss))
    rows = np.stack(
        [
            flat(slope(start, (data[0][i : i + 1], data[1][i : i + 1])))
            for i in range(40)
        ]
    )
    np.testing.assert_allclose(
        matrix_of(model), rows.T @ rows / 40, rtol=1e-10, atol=1e-14
    )
    np.testing.assert_allclose(flat(model.gradient), rows.mean(0), atol=1e-13)
    np.testing.assert_allclose(model.value, gated_loss(start, data), rtol=1e-12)
    assert flat(model.center).tolist() == [1] * sum(groups.sizes.values())


@pytest.mark.slow
def test_rows_of_gauss_newton_are_its_root_at_any_gates():
    params, groups, data = problem()
    rng = np.random.default_rng(1)
    gates = {n: jnp.asarray(rng.uniform(size=s)) for n, s in groups.sizes.items()}
    model = gate_model(
        BUILDER.loss,
        params,
        groups,
        args=data,
        curvature="gauss_newton",
        gates=gates,
        batch_size=16,
    )
    unravel = jax.flatten_util.ravel_pytree(gates)[1]

    def outputs(m):
        return predict(structure.gate(params, groups, unravel(m)), data[0])

    jacobian = np.asarray(jax.jit(jax.jacfwd(outputs))(flat(gates)))
    p = np.asarray(jax.nn.softmax(outputs(flat(gates))))
    bend = (p[:, :, None] * np.eye(3) - p[:, :, None] * p[:, None, :]) / 40
    expected = np.einsum("nci,ncd,ndj->ij", jacobian, bend, jacobian)
    np.testing.assert_allclose(matrix_of(model), expected, atol=1e-12)
    slope = jax.jit(jax.grad(gated_loss))(gates, data)
    np.testing.assert_allclose(flat(model.gradient), flat(slope), atol=1e-12)


@pytest.mark.slow
def test_probes_estimate_gauss_newton():
    params, groups, data = problem()
    build = functools.partial(
        gate_model, BUILDER.loss, params, groups, args=data, curvature=BUILDER
    )
    exact = matrix_of(build())
    many = matrix_of(build(probes=400))
    one: Any = build(probes=1).curvature
    assert one.rows.shape == (40, 15)
    assert np.linalg.norm(many - exact) < 0.05 * np.linalg.norm(exact)


def test_scores_are_the_predicted_change_of_one_removal():
    params, groups, data = problem()
    model = gate_model(BUILDER.loss, params, groups, args=data)
    scores = gate_scores(model)
    for name, size in groups.sizes.items():
        for unit in range(size):
            gates = dict(model.center)
            gates[name] = gates[name].at[unit].set(0)
            np.testing.assert_allclose(
                scores[name][unit], model(gates) - model.value, atol=1e-12
            )


@pytest.mark.slow
def test_the_solvers_of_the_package_take_a_gate_model():
    params, groups, data = problem()
    model = gate_model(
        BUILDER.loss, params, groups, args=data, curvature="gauss_newton"
    )
    matrix = matrix_of(model)
    linear = matrix @ flat(model.center) - flat(model.gradient)
    best = oracles.best_support(matrix + 1e-9 * np.eye(15), linear, 11)
    solution = sparserec.iobs(model, model.center, 11)
    lowest = float(model(_tree.layout(model.center).split(jnp.asarray(best.params))))
    assert solution.objective <= lowest + 0.1 * abs(lowest)
    assert sum(int(m.sum()) for m in solution.mask.values()) == 11


# --- elimination ---------------------------------------------------------------------


def count_terms(groups):
    """The cost of a choice as its number of units."""
    return tuple(
        Term(1, (Extent(size, (Part(name, np.arange(size), np.arange(size)),)),))
        for name, size in groups.sizes.items()
    )


def every_count(groups):
    return {name: np.arange(1, size + 1) for name, size in groups.sizes.items()}


def random_model(seed):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(30, 15))
    return rows.T @ rows / 30, 0.1 * rng.normal(size=15)


@pytest.mark.parametrize("seed", range(4))
def test_at_equal_prices_it_is_backward_elimination(seed):
    _, groups, _ = problem()
    matrix, gradient = random_model(seed)
    point = np.linalg.solve(matrix, matrix @ np.ones(15) - gradient)
    point = point.astype(np.float64)
    expected = oracles.backward_elimination(matrix, point, 10)
    left = eliminate(
        groups,
        count_terms(groups),
        every_count(groups),
        matrix,
        gradient,
        np.ones(15),
        10,
    )
    np.testing.assert_array_equal(units_of(groups).flat(left.keep), expected.mask)
    np.testing.assert_allclose(left.gates, expected.params, atol=1e-9)


@pytest.mark.parametrize("cost", ["flops", "params"])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_elimination_fits_the_budget_and_refits_exactly(cost, share):
    _, groups, _ = problem()
    terms = cost_terms(groups, cost)
    budget = share * structure.total_cost(groups, cost)
    matrix, gradient = random_model(7)
    center = np.ones(15)
    center[[0, 9]] = 0  # gone already
    left = eliminate(
        groups, terms, every_count(groups), matrix, gradient, center, budget
    )
    assert structure.total_cost(groups, cost, left.keep) <= budget
    mask = units_of(groups).flat(left.keep)
    assert not mask[[0, 9]].any()
    values = oracles.minimize_on(matrix, matrix @ center - gradient, mask)
    np.testing.assert_allclose(left.gates, values, atol=1e-9)
    step = values - center
    np.testing.assert_allclose(
        left.change, gradient @ step + step @ matrix @ step / 2, atol=1e-9
    )


def test_elimination_goes_down_in_allowed_counts():
    _, groups, _ = problem()
    allowed = {n: np.array([2, s]) for n, s in groups.sizes.items()}
    matrix, gradient = random_model(8)
    left = eliminate(
        groups, count_terms(groups), allowed, matrix, gradient, np.ones(15), 9
    )
    for name, size in groups.sizes.items():
        assert left.keep[name].sum() in (2, size)


# --- the joint choice ----------------------------------------------------------------


def solve(share=0.5, **options):
    params, groups, data = problem()
    budget = share * structure.total_cost(groups, options.get("cost", "flops"))
    options = {"args": data, "stages": 3, "held_out": 0.0, **options}
    return joint(BUILDER.loss, params, groups, budget, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"curvature": "gauss_newton", "cost": "params"},
        {"curvature": BUILDER, "probes": 2, "share": 0.25, "held_out": 0.25},
        {"solver": sparserec.iobs},
    ],
)
def test_joint_keeps_the_budget_and_says_the_truth(options):
    params, groups, data = problem()
    solution = solve(**options)
    cost = options.get("cost", "flops")
    whole = structure.total_cost(groups, cost)
    kept = structure.total_cost(groups, cost, solution.mask)
    assert kept <= options.get("share", 0.5) * whole
    assert solution.status == Status.CONVERGED
    for gates, mask in zip(
        solution.params.values(), solution.mask.values(), strict=True
    ):
        np.testing.assert_array_equal(gates != 0, mask)
    if not options.get("held_out"):
        loss = gated_loss(solution.params, data)
        np.testing.assert_allclose(solution.objective, loss, rtol=1e-12)
    # Folded into the weights, shrunk, and run: the same function.
    folded = structure.gate(params, groups, solution.params)
    small = structure.shrink(folded, groups, solution.mask)
    fast = structure.resized(predict, groups, solution.mask)
    np.testing.assert_allclose(
        fast(small, data[0]),
        predict(folded, data[0]),
        rtol=1e-10,
        atol=1e-12,
    )


def trained(steps=300):
    """The network at a minimum, where local models mean something."""
    params, groups, data = problem()
    descend = jax.jit(
        lambda p: jax.tree.map(
            lambda w, g: w - 0.05 * g, p, jax.grad(BUILDER.loss)(p, *data)
        )
    )
    for _ in range(steps):
        params = descend(params)
    return params, groups, data


def best_of_all(params, groups, data, budget):
    """The lowest loss of any choice of units that fits, gates left open."""
    units = units_of(groups)

    @jax.jit
    @jax.vmap
    def loss(flat_gates):
        gates = {
            n: flat_gates[s] for n, s in zip(units.names, units.spans, strict=True)
        }
        return BUILDER.loss(structure.gate(params, groups, gates), *data)

    fitting = [
        bits
        for bits in itertools.product([False, True], repeat=units.size)
        if all(np.any(bits[span]) for span in units.spans)
        and structure.total_cost(groups, "flops", units.split(np.array(bits))) <= budget
    ]
    return float(jnp.min(loss(jnp.asarray(np.array(fitting, float)))))


@pytest.mark.slow
def test_joint_is_as_good_as_trying_every_choice():
    params, groups, data = trained()
    budget = 0.5 * structure.total_cost(groups)
    best = best_of_all(params, groups, data, budget)
    solution = joint(
        BUILDER.loss, params, groups, budget, args=data, curvature="gauss_newton"
    )
    assert solution.objective <= 1.1 * best


def test_joint_beats_scores_of_single_units():
    params, groups, data = problem()
    budget = 0.5 * structure.total_cost(groups)
    squares = jax.tree.map(jnp.square, params)
    for scores in (
        structure.unit_scores(groups, squares),
        gate_scores(gate_model(BUILDER.loss, params, groups, args=data)),
    ):
        keep = structure.select(groups, scores, budget)
        closed = {n: jnp.asarray(k, jnp.float64) for n, k in keep.items()}
        assert solve().objective < gated_loss(closed, data)


def test_a_budget_for_everything_leaves_all_gates_open():
    solution = solve(share=1.0)
    assert all(np.all(np.asarray(m) == 1) for m in solution.params.values())
    assert solution.iterations == 0


def test_least_counts_and_multiples_hold():
    solution = solve(share=0.6, min_keep=2, multiple_of=2)
    for mask in solution.mask.values():
        assert mask.sum() >= 2
        assert int(mask.sum()) % 2 == 0 or mask.all()


def test_every_stage_may_see_fresh_data():
    _, _, data = problem()
    seen = []

    def batches(stage):
        seen.append(stage)
        return tuple(x[stage * 8 : stage * 8 + 16] for x in data)

    solution = solve(args=(), batches=batches, refinements=0)
    assert seen == [0, 0, 1, 2]
    assert np.isfinite(solution.history.objective).all()


def test_what_is_not_a_gate_can_follow_after_every_stage():
    """A norm that the caller knows how to restore."""
    params, groups, data = problem()
    calls = []

    def repair(weights):
        calls.append(weights)
        length = jnp.linalg.norm(weights["mid"])
        return {**weights, "mid": weights["mid"] * (3.0 / length)}

    solution = solve(repair=repair)
    assert len(calls) > 3
    folded = repair(structure.gate(params, groups, solution.params))
    np.testing.assert_allclose(
        solution.objective, BUILDER.loss(folded, *data), rtol=1e-12
    )


@pytest.mark.slow
def test_half_precision_is_solved_in_single():
    params, groups, data = problem()
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)

    def loss(params, x, labels):
        outputs = predict(params, x.astype(jnp.float32))
        return quadratic.softmax_cross_entropy(outputs, labels)

    budget = 0.5 * structure.total_cost(groups)
    solution = joint(loss, half, groups, budget, args=data, stages=1)
    assert all(m.dtype == jnp.float32 for m in solution.params.values())


# --- bad input -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"share": 1e-3}, "smallest reachable cost is"),
        ({"stages": 0}, "`stages` must be an integer"),
        ({"held_out": 1.0}, r"`held_out` must lie in \[0, 1\)"),
        ({"min_keep": 0}, "empty a layer"),
        ({"batches": tuple}, "either `args` or `batches`"),
        ({"curvature": "hessian"}, "'fisher', 'gauss_newton' or a builder"),
        ({"probes": 2}, "with a Gauss-Newton curvature"),
        ({"batch_size": 0}, "`batch_size` must be an integer"),
    ],
)
def test_bad_choices_say_what_to_write(change, words):
    with pytest.raises(ValueError, match=words):
        solve(**change)


def test_a_cost_that_is_not_known_is_refused():
    params, groups, data = problem()
    with pytest.raises(ValueError, match="'flops', 'params'"):
        joint(BUILDER.loss, params, groups, 1, args=data, cost="time")  # type: ignore


def test_a_loss_that_is_not_finite_is_refused():
    params, groups, data = problem()
    broken = {**params, "out": params["out"] * jnp.nan}
    budget = 0.5 * structure.total_cost(groups)
    with pytest.raises(ValueError, match="NaN or infinite at the starting params"):
        joint(BUILDER.loss, broken, groups, budget, args=data)


def test_a_function_without_units_is_refused():
    def loss(w, x):
        return jnp.mean(x @ w)

    w, x = jnp.ones(3), jnp.ones((4, 3))
    groups = structure.groups(loss, w, x)
    with pytest.raises(ValueError, match="`groups` is empty"):
        gate_model(loss, w, groups, args=(x,))
