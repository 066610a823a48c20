"""Linen and nnx: the same weights give the same answer whatever holds them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import sparserec
from sparserec import quadratic
from sparserec._report import report
from sparserec.training import keep_mask

INPUTS, OUTPUTS, KEPT = 6, 2, 5


# --- one least-squares problem through every container -------------------------------


def as_array(kernel, bias):
    return jnp.concatenate([kernel.reshape(-1), bias])


def as_plain_dict(kernel, bias):
    return {"zz": {"kernel": kernel}, "aa": bias}


def as_tuples(kernel, bias):
    return ((kernel[:2], (kernel[2:],)), bias)


def as_linen(kernel, bias):
    layer = nn.Dense(OUTPUTS, param_dtype=float)
    params = layer.init(jax.random.key(0), jnp.ones((1, INPUTS)))["params"]
    return jax.tree.unflatten(jax.tree.structure(params), [bias, kernel])


def as_nnx(kernel, bias):
    layer = nnx.Linear(INPUTS, OUTPUTS, param_dtype=float, rngs=nnx.Rngs(0))
    state = nnx.state(layer, nnx.Param)
    return jax.tree.unflatten(jax.tree.structure(state), [bias, kernel])


def parts_of_array(params):
    return params[: INPUTS * OUTPUTS].reshape(INPUTS, OUTPUTS), params[-OUTPUTS:]


CONTAINERS = {
    "array": (as_array, parts_of_array),
    "plain dict": (as_plain_dict, lambda p: (p["zz"]["kernel"], p["aa"])),
    "nested tuples": (
        as_tuples,
        lambda p: (jnp.concatenate([p[0][0], p[0][1][0]]), p[1]),
    ),
    "linen dict": (as_linen, lambda p: (p["kernel"], p["bias"])),
    "nnx State": (as_nnx, lambda p: (p["kernel"][...], p["bias"][...])),
}


def least_squares_data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, INPUTS))
    kernel = rng.normal(size=(INPUTS, OUTPUTS)) * (rng.random((INPUTS, OUTPUTS)) < 0.4)
    y = x @ kernel + 0.05 * rng.normal(size=(40, OUTPUTS)) + 0.3
    return jnp.asarray(x), jnp.asarray(y)


def everything(path, leaf):  # noqa: ARG001
    return True


def solve_in(container, solver):
    build, parts = CONTAINERS[container]

    def loss(params, x, y):
        kernel, bias = parts(params)
        return quadratic.squared_error(x @ kernel + bias[None], y)

    start = build(jnp.zeros((INPUTS, OUTPUTS)), jnp.zeros(OUTPUTS))
    solution = solver(loss, start, KEPT, args=least_squares_data(), prunable=everything)
    assert jax.tree.structure(solution.params) == jax.tree.structure(start)
    assert jax.tree.structure(solution.mask) == jax.tree.structure(start)
    found, mask = map(parts, (solution.params, solution.mask))
    return (
        np.concatenate([np.ravel(x) for x in found]),
        np.concatenate([np.ravel(x) for x in mask]),
        float(solution.objective),
    )


# The first compiles fastest, and five containers are five compilations.
@pytest.mark.parametrize(
    "solver",
    [
        pytest.param(functools.partial(sparserec.iht, step_size=0.3), id="fixed step"),
        pytest.param(sparserec.iht, id="iht", marks=pytest.mark.slow),
        pytest.param(sparserec.iobs, id="iobs", marks=pytest.mark.slow),
    ],
)
def test_the_answer_does_not_depend_on_the_container(solver):
    weights, mask, objective = solve_in("array", solver)
    assert mask.sum() == KEPT
    x, y = map(np.asarray, least_squares_data())
    # Independent: the refit on that support, by NumPy.
    design = np.kron(np.c_[x, np.ones(len(x))], np.eye(OUTPUTS))[:, mask]
    refit, *_ = np.linalg.lstsq(design, y.ravel(), rcond=None)
    np.testing.assert_allclose(weights[mask], refit, rtol=1e-3, atol=1e-4)
    for container in CONTAINERS:
        other, other_mask, other_objective = solve_in(container, solver)
        np.testing.assert_array_equal(other_mask, mask, err_msg=container)
        np.testing.assert_allclose(other, weights, rtol=1e-6, err_msg=container)
        assert other_objective == pytest.approx(objective, rel=1e-9)


def test_budgets_speak_of_the_same_leaves_in_linen_and_nnx():
    counts = [
        sparserec.keep(build(jnp.ones((6, 2)), jnp.ones(2)), density=0.5, per_leaf=True)
        for build in (as_linen, as_nnx)
    ]
    assert counts == [{"kernel": 6}, {"kernel": 6}]


# --- worked examples: prune, then train ----------------------------------------------


def classification_data():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(96, 8)).astype(np.float32)
    labels = np.argmax(x[:, :3] + 0.5 * x[:, 3:6] ** 2, axis=1).astype(np.int32)
    return jnp.asarray(x), jnp.asarray(labels)


OPTIMIZER = optax.adamw(1e-2, weight_decay=0.1)


def assert_zeros_are_exact(params, mask):
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(mask), strict=True)
    pruned = np.concatenate([np.asarray(x)[~np.asarray(m)] for x, m in pairs])
    assert pruned.size > 0
    assert np.array_equal(pruned, np.zeros_like(pruned))


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(12)(x)))


@pytest.mark.usefixtures("lenient_promotion")
def test_linen_prune_then_train():
    x, labels = classification_data()
    net = Classifier()
    params = net.init(jax.random.key(0), x)["params"]

    def predict(params, x):
        return net.apply({"params": params}, x)

    curvature = quadratic.gauss_newton(predict, quadratic.softmax_cross_entropy)
    solution = sparserec.iobs(
        curvature.loss,
        params,
        sparserec.keep(params, density=0.25),
        args=(x, labels),
        curvature=curvature,
        schedule="down",
        stages=3,
        max_steps=3,
    )
    state = TrainState.create(
        apply_fn=net.apply,
        params=solution.params,
        tx=optax.chain(OPTIMIZER, keep_mask(solution.mask)),
    )

    @jax.jit
    def step(state, x, labels):
        value, gradient = jax.value_and_grad(curvature.loss)(state.params, x, labels)
        return state.apply_gradients(grads=gradient), value

    losses = []
    for _ in range(50):
        state, value = step(state, x, labels)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    assert_zeros_are_exact(state.params, solution.mask)
    kept = report(params, solution)
    assert [row.density for row in kept.rows if row.path.endswith("bias")] == [1, 1]
    kernels = [row for row in kept.rows if row.path.endswith("kernel")]
    assert sum(row.kept for row in kernels) == sparserec.keep(params, density=0.25)


@pytest.mark.usefixtures("lenient_promotion")
def test_nnx_prune_then_train():
    x, labels = classification_data()
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(8, 12, rngs=rngs), nnx.relu, nnx.Linear(12, 3, rngs=rngs)
    )
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, x, labels):
        logits = nnx.merge(graphdef, params, rest)(x)
        return quadratic.softmax_cross_entropy(logits, labels)

    k = sparserec.keep(params, density=0.25)
    solution = sparserec.iht(loss, params, k, args=(x, labels), max_steps=20)
    nnx.update(model, solution.params)
    assert_zeros_are_exact(nnx.state(model, nnx.Param), solution.mask)
    np.testing.assert_allclose(
        quadratic.softmax_cross_entropy(model(x), labels), solution.objective, rtol=1e-5
    )
    optimizer = nnx.Optimizer(
        model, optax.chain(OPTIMIZER, keep_mask(solution.mask)), wrt=nnx.Param
    )

    @nnx.jit
    def step(model, optimizer, x, labels):
        value, gradient = nnx.value_and_grad(
            lambda model: quadratic.softmax_cross_entropy(model(x), labels)
        )(model)
        optimizer.update(model, gradient)
        return value

    losses = [float(step(model, optimizer, x, labels)) for _ in range(50)]
    assert losses[-1] < losses[0]
    assert_zeros_are_exact(nnx.state(model, nnx.Param), solution.mask)
    paths = [row.path for row in report(params, solution).rows]
    assert paths == [
        f"layers/{i}/{name}" for i in (0, 2) for name in ("bias", "kernel")
    ]


def test_the_mask_of_another_nnx_model_is_refused_at_once():
    small, large = (nnx.Linear(4, size, rngs=nnx.Rngs(0)) for size in (2, 3))
    mask = jax.tree.map(lambda x: x > 0, nnx.state(small, nnx.Param))
    with pytest.raises(ValueError, match="'bias' has shape"):
        nnx.Optimizer(large, keep_mask(mask), wrt=nnx.Param)
