"""Curvature of layers' outputs, against what the layers do and against matrices."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import sparserec
from sparserec import _tree, quadratic
from sparserec.quadratic import InputGrams, _input_grams

EXAMPLES = 12
STRIDED: dict[str, Any] = {
    "window_strides": (2, 1),
    "padding": ((1, 0), (2, 1)),
    "rhs_dilation": (1, 2),
    "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
}
CHANNELS_FIRST: dict[str, Any] = {"window_strides": (1, 1), "padding": "VALID"}


def layers(params, x):
    """Every layer with its inputs: name -> (function of the weights, outputs' axis)."""
    first = functools.partial(jax.lax.conv_general_dilated, x, **STRIDED)
    y = jnp.transpose(jnp.tanh(first(params["first"])), (0, 3, 1, 2))
    second = functools.partial(jax.lax.conv_general_dilated, y, **CHANNELS_FIRST)
    z = jax.nn.relu(second(params["second"]) + params["bias"][None, :, None, None])
    z = jnp.mean(z, axis=(2, 3))
    third = functools.partial(jnp.matmul, z)
    h = jnp.tanh(third(params["third"]))
    return {
        "first": (first, 3),
        "second": (second, 1),
        "third": (third, 1),
        "fourth": (lambda w: (w @ h.T).T, 1),
    }


def loss(params, x, y):
    applied, _ = layers(params, x)["fourth"]
    return quadratic.squared_error(applied(params["fourth"]), y)


@functools.cache
def problem():
    rng = np.random.default_rng(0)
    shapes = {
        "first": (3, 2, 2, 4),
        "second": (5, 4, 2, 2),
        "bias": (5,),
        "third": (5, 6),
        "fourth": (3, 6),
    }
    params = {n: jnp.asarray(rng.normal(size=s)) / 2 for n, s in shapes.items()}
    x = jnp.asarray(rng.normal(size=(EXAMPLES, 6, 7, 2)) + 0.5)
    return params, (x, jnp.asarray(rng.normal(size=(EXAMPLES, 3))))


def change_of_outputs(params, step, x, centered):
    """Half the mean squared change of each layer's outputs, its inputs as they are."""
    found = {}
    for name, (apply, axis) in layers(params, x).items():
        change = np.moveaxis(np.asarray(apply(step[name])), axis, -1)
        change = change.reshape(-1, change.shape[-1])
        if centered(name):
            change = change - change.mean(axis=0)
        found[name] = np.mean(np.sum(change**2, axis=1)) / 2
    return found


def random_step(params, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape)), params)


@pytest.mark.parametrize("which", [False, True, "first"])
def test_the_model_is_the_change_of_outputs(which):
    params, args = problem()
    step = random_step(params, 1)

    def centered(path, *_):
        return path == which if isinstance(which, str) else which

    builder = quadratic.layerwise(
        batch_size=EXAMPLES,
        centered=centered if isinstance(which, str) else which,
        normalize=False,
        ridge=0.3,
    )
    model = builder(loss, params, args)
    expected = sum(change_of_outputs(params, step, args[0], centered).values())
    expected += 0.15 * sum(float(jnp.sum(d**2)) for d in step.values())
    np.testing.assert_allclose(model.value, loss(params, *args), rtol=1e-12)
    np.testing.assert_allclose(
        model(_tree.add(params, step)) - model.value, expected, rtol=1e-10
    )
    assert not np.any(_tree.flatten(model.gradient))


def _grams(model):
    assert isinstance(model.curvature, InputGrams)
    return model.curvature.grams


def test_batches_add_up_and_layers_have_one_scale():
    params, args = problem()
    whole, parts = (
        quadratic.layerwise(batch_size=size)(loss, params, args)
        for size in (EXAMPLES, 5)
    )
    np.testing.assert_allclose(parts.value, whole.value, rtol=1e-12)
    for a, b in zip(_grams(whole), _grams(parts), strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            np.testing.assert_allclose(a, b, rtol=1e-10)
            np.testing.assert_allclose(np.mean(np.diag(a)), 1)


def test_centered_batches_have_their_own_means():
    params, args = problem()
    step = random_step(params, 2)
    builder = quadratic.layerwise(batch_size=4, centered=True, normalize=False)
    model = builder(loss, params, args)
    expected = np.mean(
        [
            sum(change_of_outputs(params, step, piece, lambda _: True).values())
            for piece in np.split(np.asarray(args[0]), 3)
        ]
    )
    found = model(_tree.add(params, step)) - model.value
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@functools.cache
def curvature() -> InputGrams:
    params, args = problem()
    found = quadratic.layerwise(ridge=0.2)(loss, params, args).curvature
    assert isinstance(found, InputGrams)
    return found


@functools.cache
def matrix():
    """The matrix, a column for every entry, from products with unit vectors."""
    layout, whole = _tree.layout(problem()[0]), curvature()
    product = jax.jit(lambda v: _tree.flatten(whole.matvec(layout.split(v))))
    return np.stack([product(unit) for unit in np.eye(layout.size)], axis=1)


def test_operations_agree_with_the_matrix():
    params, _ = problem()
    rhs, h = random_step(params, 3), matrix()
    flat, damping = np.asarray(_tree.flatten(rhs)), 0.05
    shifted = h + damping * np.eye(flat.size)
    np.testing.assert_allclose(h, h.T, atol=1e-12)
    assert np.min(np.linalg.eigvalsh(h)) > 0.19
    close = functools.partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-10)
    close(_tree.flatten(curvature().diagonal()), np.diag(h))
    index = jnp.asarray([0, 40, 100])
    close(curvature().columns(index), h[:, index])
    close(
        _tree.flatten(curvature().inverse_diagonal(jnp.asarray(damping))),
        np.diag(np.linalg.inv(shifted)),
    )
    close(
        _tree.flatten(curvature().resolvent(jnp.asarray(damping))(rhs)),
        np.linalg.solve(shifted, flat),
    )
    close(
        curvature().effective_dimension(jnp.asarray(damping)),
        np.trace(np.linalg.solve(shifted, h)),
    )
    other = curvature().with_ridge(0.7)
    close(_tree.flatten(other.diagonal()), np.diag(h) + 0.5)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_solves_on_supports(share):
    params, _ = problem()
    rhs, h = random_step(params, 4), matrix()
    mask = jax.tree.map(
        lambda x: jnp.asarray(np.random.default_rng(5).random(x.shape) < share), params
    )
    solve = jax.jit(curvature().solve_on)
    solved = solve(mask, rhs, jnp.asarray(0.05))
    inside = np.flatnonzero(_tree.flatten(mask))
    expected = np.zeros(len(h))
    system = h[np.ix_(inside, inside)] + 0.05 * np.eye(inside.size)
    expected[inside] = np.linalg.solve(system, np.asarray(_tree.flatten(rhs))[inside])
    assert int(solved.status) == sparserec.Status.CONVERGED
    np.testing.assert_allclose(
        _tree.flatten(solved.value), expected, rtol=1e-8, atol=1e-10
    )


def test_every_buffer_holds_the_system_it_is_for():
    width = 150
    assert _input_grams.buffer_sizes(width) == [38, 75, 150]
    rng = np.random.default_rng(6)
    gram = np.cov(rng.normal(size=(width, 400)))
    params = {"w": jnp.zeros((width, 9))}
    found = InputGrams(
        [jnp.asarray(gram)], jnp.asarray(0.0), ((1, 0),), _tree.layout(params)
    )
    mask = np.zeros((width, 9), bool)
    for output, count in enumerate((0, 1, 37, 38, 39, 75, 76, 149, 150)):
        mask[rng.permutation(width)[:count], output] = True
    rhs = rng.normal(size=(width, 9))
    solved = found.solve_on(
        {"w": jnp.asarray(mask)}, {"w": jnp.asarray(rhs)}, jnp.zeros(())
    )
    expected = np.zeros((width, 9))
    for output in range(9):
        inside = np.flatnonzero(mask[:, output])
        system = gram[np.ix_(inside, inside)]
        expected[inside, output] = np.linalg.solve(system, rhs[inside, output])
    np.testing.assert_allclose(solved.value["w"], expected, rtol=1e-7, atol=1e-9)


def test_a_singular_layer_is_not_solved_silently():
    params = {"w": jnp.ones((3, 2))}
    flat = InputGrams(
        [jnp.zeros((3, 3))], jnp.asarray(0.0), ((1, 0),), _tree.layout(params)
    )
    solved = flat.solve_on(_tree.ones_mask(params), params, jnp.zeros(()))
    assert int(solved.status) == sparserec.Status.NOT_POSITIVE_DEFINITE


def test_pruned_layers_are_refitted_to_their_outputs():
    """The same as least squares of every output on the inputs that it keeps."""
    params, args = problem()
    builder = quadratic.layerwise(batch_size=EXAMPLES)
    k, model = 60, builder(loss, params, args)
    solution = sparserec.chita(model, params, k, variant="admm", metric=0)
    assert sum(int(jnp.sum(solution.mask[n])) for n in params if n != "bias") == k
    np.testing.assert_array_equal(solution.params["bias"], params["bias"])
    z = jax.nn.relu(
        layers(params, args[0])["second"][0](params["second"])
        + params["bias"][None, :, None, None]
    )
    inputs, dense = np.asarray(jnp.mean(z, axis=(2, 3))), np.asarray(params["third"])
    for output in range(dense.shape[1]):
        inside = np.flatnonzero(solution.mask["third"][:, output])
        target = inputs @ dense[:, output]
        best = np.linalg.lstsq(inputs[:, inside], target, rcond=None)[0]
        np.testing.assert_allclose(
            solution.params["third"][inside, output], best, rtol=1e-6, atol=1e-8
        )


def test_partial_losses_and_compiled_callers():
    params, args = problem()

    def scaled(factor, params, x, y):
        return factor * loss(params, x, y)

    builder = quadratic.layerwise(batch_size=EXAMPLES)
    model = jax.jit(lambda p, a: builder(Partial(scaled, jnp.asarray(2.0)), p, a))(
        params, args
    )
    np.testing.assert_allclose(model.value, 2 * loss(params, *args), rtol=1e-12)


def test_matrices_that_are_no_layer_are_named():
    params = {"table": jnp.ones((4, 3)), "w": jnp.ones((3, 2))}

    def embedded(params, tokens):
        return jnp.mean(jnp.square(params["table"][tokens] @ params["w"]))

    with pytest.raises(ValueError, match="table"):
        quadratic.layerwise()(embedded, params, (jnp.arange(4),))

    def tied(params, x):
        return jnp.mean(jnp.square(x @ params["w"] @ params["w"].T))

    with pytest.raises(ValueError, match="two ways"):
        quadratic.layerwise()(tied, {"w": jnp.ones((3, 2))}, (jnp.ones((4, 3)),))


def test_inputs_with_nan_are_refused():
    params, (x, y) = problem()
    with pytest.raises(ValueError, match=r"first.*NaN"):
        quadratic.layerwise()(loss, params, (x.at[3].set(jnp.nan), y))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"ridge": -1.0}, "ridge"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 1, "centered": True}, "at least 2"),
    ],
)
def test_bad_options_are_explained(options, match):
    with pytest.raises(ValueError, match=match):
        quadratic.layerwise(**options)
