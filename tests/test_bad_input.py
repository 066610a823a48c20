"""Wrong input is refused before anything is traced, in words that help."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparserec
from sparserec import SolveError, Status, quadratic

SOLVERS = {
    "iht": sparserec.iht,
    "iobs": sparserec.iobs,
    "splicing": sparserec.splicing,
}
every = pytest.mark.parametrize("solve", SOLVERS.values(), ids=SOLVERS)

TRACES = []


def loss(params, inputs, targets):
    TRACES.append(None)
    return jnp.mean(jnp.square(inputs @ params["kernel"] - targets))


PARAMS = {"bias": jnp.zeros(2), "kernel": jnp.ones((3, 2))}
ARGS = (jnp.ones((5, 3)), jnp.ones((5, 2)))
MODEL = quadratic.least_squares(jnp.eye(4), jnp.ones(4))


def refused(error, words, call, *args, **options):
    """The call raises, with these words, and has not traced the loss."""
    TRACES.clear()
    with pytest.raises(error, match=f"(?s){words}"):
        call(*args, **options)
    assert not TRACES


# --- budgets -------------------------------------------------------------------------


@every
@pytest.mark.parametrize(
    ("k", "error", "words"),
    [
        (-1, ValueError, r"`k` must lie in \[0, 6\] .*got -1"),
        (7, ValueError, r"6 prunable weights.*got 7"),
        (0.5, TypeError, r"got 0\.5.*keep\(params, density="),
        (1.0, TypeError, "an integer, got 1.0"),
        (jnp.asarray(2.0), TypeError, "an integer"),
        (True, TypeError, "the bool True"),
        ("2", TypeError, "an integer, got '2'"),
        (None, TypeError, "an integer, got None"),
        (np.array([1, 2]), TypeError, "jax.vmap"),
        ({}, ValueError, "names no leaf"),
        ({"kernels": 2}, ValueError, r"\['kernels'\].*\['kernel'\]"),
        ({"bias": 1}, ValueError, r"\['bias'\].*prunable leaves"),
        ({"kernel": 7}, ValueError, r"k\['kernel'\].*\[0, 6\]"),
        ({"kernel": 0.5}, TypeError, r"k\['kernel'\].*density="),
    ],
)
def test_wrong_budget(solve, k, error, words):
    refused(error, words, solve, loss, PARAMS, k, args=ARGS)


@every
@pytest.mark.parametrize(
    ("params", "error", "words"),
    [
        ({}, ValueError, "holds no array.*variables"),
        (None, ValueError, "holds no array"),
        ({"kernel": jnp.ones((3, 2), int)}, TypeError, "'kernel'.*int64.*astype"),
        ({"kernel": jnp.ones((3, 2), complex)}, TypeError, "'kernel'.*complex128"),
        ({"kernel": [[1.0, 2.0]]}, TypeError, "'kernel/0/0' is a float"),
        ("weights", TypeError, "the array is a str"),
    ],
)
def test_wrong_params(solve, params, error, words):
    refused(error, words, solve, loss, params, 1, args=ARGS)


@every
@pytest.mark.parametrize(
    ("prunable", "words"),
    [
        (lambda *_: False, "selects no leaf.*'bias', 'kernel'"),
        ({"kernel": True}, "pytree of bools"),
        ("kernel", "predicate"),
    ],
)
def test_wrong_prunable(solve, prunable, words):
    refused(ValueError, words, solve, loss, PARAMS, 1, args=ARGS, prunable=prunable)


# --- options -------------------------------------------------------------------------


@every
@pytest.mark.parametrize("max_steps", [0, -1, 2.5, True, None, "10"])
def test_wrong_number_of_steps(solve, max_steps):
    words = "`max_steps` must be an integer of at least 1, got"
    refused(ValueError, words, solve, loss, PARAMS, 1, args=ARGS, max_steps=max_steps)


@every
@pytest.mark.parametrize("batch_size", [0, -1, 2.5, True])
def test_wrong_batch_size(solve, batch_size):
    words = "`batch_size` must be an integer of at least 1, got"
    refused(ValueError, words, solve, loss, PARAMS, 1, args=ARGS, batch_size=batch_size)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("mask_rule", "topk", r"\['backward', 'exact', 'saliency', 'top_k'\].*'topk'"),
        ("mask_rule", None, "`mask_rule` must be one of"),
        ("values", "obc", "'obs' or 'top_k', got 'obc'"),
        ("schedule", "linear", "None, 'down'.*'up'.*got 'linear'"),
        ("schedule", 3, "`schedule` must be"),
        ("step_size", "large", "'auto' or a number, got 'large'"),
        ("damping", "adaptive", "'auto' or a number, got 'adaptive'"),
        ("damping", -0.1, r"at least 0, got -0\.1"),
        ("damping", float("nan"), "at least 0, got nan"),
        ("stages", 0, "`stages` must be an integer"),
        ("held_out", 1.0, r"\[0, 1\)"),
        ("held_out", -0.1, r"\[0, 1\)"),
    ],
)
def test_wrong_options_of_iobs(option, value, words):
    options = {option: value}
    refused(ValueError, words, sparserec.iobs, loss, PARAMS, 1, args=ARGS, **options)


def test_wrong_step_size_of_iht():
    words = "'auto' or a number, got 'large'"
    refused(
        ValueError, words, sparserec.iht, loss, PARAMS, 1, args=ARGS, step_size="large"
    )


FAMILY = {
    name: getattr(sparserec, name)
    for name in (
        "htp",
        "subspace_pursuit",
        "cosamp",
        "grasp",
        "splicing",
        "omp",
        "foba",
    )
}


@pytest.mark.parametrize("solve", FAMILY.values(), ids=FAMILY)
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"damping": -1.0}, ValueError, "`damping` must be a finite number"),
        ({"groups": {"kernel": 1}}, ValueError, r"`groups` must hold one label"),
        (
            {"groups": {"bias": np.zeros(2, int), "kernel": np.zeros((2, 3), int)}},
            ValueError,
            r"shapes of `params`, \(\(2,\), \(3, 2\)\); got",
        ),
        (
            {"groups": {"bias": np.zeros(2), "kernel": np.zeros((3, 2))}},
            TypeError,
            r"integer labels, got dtype float64.*astype\(int\)",
        ),
    ],
)
def test_wrong_options_of_the_pursuit_family(solve, options, error, words):
    refused(error, words, solve, loss, PARAMS, 1, args=ARGS, **options)


LABELS = {"bias": np.zeros(2, int), "kernel": np.array([[0, 0], [1, 1], [4, 4]])}


def test_wrong_groups():
    solve = functools.partial(sparserec.htp, loss, PARAMS, args=ARGS)
    refused(ValueError, r"\[0, 3\] \(3 groups\), got 4", solve, k=4, groups=LABELS)
    refused(
        TypeError,
        "must be concrete",
        jax.jit(lambda labels: solve(k=1, groups=labels)),
        LABELS,
    )
    both = {"bias": True, "kernel": True}
    refused(
        ValueError,
        "must not share a label",
        solve,
        k={"bias": 1, "kernel": 1},
        groups=LABELS,
        prunable=both,
    )


def test_wrong_choices_of_the_pursuit_family():
    call = functools.partial(refused, ValueError)
    words = "'correlation' or 'gain', got 'best'"
    call(words, sparserec.omp, loss, PARAMS, 1, args=ARGS, rule="best")
    words = "`exchange` must be an integer of at least 1, got 0"
    call(words, sparserec.splicing, loss, PARAMS, 1, args=ARGS, exchange=0)
    words = "`share` must be a finite number of at least 0, got -1"
    call(words, sparserec.foba, loss, PARAMS, 1, args=ARGS, share=-1)


def test_enumeration_of_too_many_supports():
    refused(
        ValueError,
        "at most 16 weights; these params have 17. Use 'backward'",
        sparserec.iobs,
        MODEL,
        jnp.zeros(17),
        1,
        mask_rule="exact",
    )


# --- data ----------------------------------------------------------------------------


@every
@pytest.mark.parametrize("args", [list(ARGS), ARGS[0], {"inputs": ARGS[0]}, None])
def test_data_that_are_no_tuple(solve, args):
    words = r"`args` must be a tuple, got .*args=\(x, y\)"
    refused(TypeError, words, solve, loss, PARAMS, 1, args=args)


@every
def test_examples_that_do_not_match(solve):
    args = (jnp.ones((5, 3)), jnp.ones((4, 2)))
    with pytest.raises(ValueError, match=r"leading sizes differ .*\(5, 3\), \(4, 2\)"):
        solve(loss, PARAMS, 1, args=args)


@every
@pytest.mark.parametrize(
    "args", [(jnp.ones((5, 3)), jnp.ones((4, 2))), (jnp.ones((5, 3)), jnp.ones(())), ()]
)
def test_chunks_of_data_that_have_no_common_axis(solve, args):
    words = "must share their leading axis"
    refused(ValueError, words, solve, loss, PARAMS, 1, args=args, batch_size=2)


STACKED = jax.tree.map(lambda x: jnp.stack([x] * 3), ARGS)


@pytest.mark.parametrize(
    ("batches", "error", "words"),
    [
        (list(STACKED), ValueError, "tuple of arrays that share"),
        ((STACKED[0], STACKED[1][:2]), ValueError, "leading sizes"),
        ((STACKED[0], jnp.ones(())), ValueError, "one entry per step"),
        ((), ValueError, "tuple of arrays"),
        (lambda _: ARGS[0], TypeError, r"must return a tuple .*\(x, y\)"),
        (lambda _: list(ARGS), TypeError, "must return a tuple"),
    ],
)
def test_wrong_batches(batches, error, words):
    refused(error, words, sparserec.iobs, loss, PARAMS, 1, batches=batches)


def test_data_and_batches_together():
    words = "either `args` .* or `batches`"
    options = {"args": ARGS, "batches": STACKED}
    refused(ValueError, words, sparserec.iobs, loss, PARAMS, 1, **options)


@every
def test_models_take_no_data(solve):
    with pytest.raises(ValueError, match="takes no data"):
        solve(MODEL, jnp.zeros(4), 1, args=ARGS)


@every
@pytest.mark.parametrize(
    "params", [jnp.zeros(3), {"w": jnp.zeros(4)}, jnp.zeros((4, 1))]
)
def test_params_that_do_not_fit_the_model(solve, params):
    with pytest.raises(ValueError, match="structure and shapes of the model's center"):
        solve(MODEL, params, 1)


# --- losses --------------------------------------------------------------------------


@every
@pytest.mark.parametrize(
    "wrong",
    [
        lambda p: p["bias"],
        lambda _: jnp.ones(1),
        lambda _: jnp.asarray(1),
        lambda _: jnp.asarray(1.0 + 0j),
        lambda p: (jnp.sum(p["kernel"]), jnp.zeros(3)),
    ],
    ids=["vector", "one entry", "integer", "complex", "with extras"],
)
def test_loss_that_is_no_real_number(solve, wrong):
    with pytest.raises(ValueError, match=r"one real number, got .*jnp\.mean"):
        solve(wrong, PARAMS, 1)


def infinite_loss(params, value):
    return jnp.sum(params["kernel"]) + value


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_loss_that_is_not_finite_at_the_start(value):
    # What every solver does with NaN in the data is in the contract.
    with pytest.raises(ValueError, match="NaN or infinite at the starting params"):
        sparserec.iht(
            infinite_loss,
            PARAMS,
            1,
            args=(jnp.asarray(value),),
            step_size=0.1,
            max_steps=1,
        )


def test_errors_of_the_loss_itself_are_not_hidden():
    def broken(_):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        sparserec.iobs(broken, PARAMS, 1)
    with pytest.raises(TypeError, match="missing 2 required positional arguments"):
        sparserec.iht(loss, PARAMS, 1)


# --- curvatures ----------------------------------------------------------------------


def predict(params, inputs):
    return inputs @ params["kernel"]


PRODUCTS = quadratic.gauss_newton(predict, quadratic.squared_error)


@pytest.mark.parametrize(
    ("rule", "operation"),
    [
        ("saliency", "inverse_diagonal"),
        ("backward", "to_matrix"),
        ("exact", "to_matrix"),
    ],
)
@pytest.mark.parametrize(
    "options",
    [
        {"curvature": PRODUCTS},
        {"curvature": quadratic.Hessian(dense_limit=7)},
        {"batch_size": 2},
    ],
    ids=["gauss newton", "large hessian", "chunks"],
)
def test_rule_that_the_curvature_cannot_serve(rule, operation, options):
    with pytest.raises(ValueError, match=f"{operation}.*MatrixFree does not have"):
        sparserec.iobs(loss, PARAMS, 1, args=ARGS, mask_rule=rule, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"held_out": 0.2}, "`held_out` has no effect.*known by products"),
        ({"refinements": 2}, "`refinements` has no effect.*known by products"),
        (
            {"curvature": PRODUCTS, "refinements": 2, "damping": 0.1},
            "`refinements` has no effect.*adaptive damping",
        ),
        (
            {"curvature": PRODUCTS, "step_size": 0.5},
            "`step_size` has no effect.*stored curvatures",
        ),
    ],
)
def test_options_that_would_have_no_effect(options, words):
    with pytest.raises(ValueError, match=words):
        sparserec.iobs(loss, PARAMS, 1, args=ARGS, **options)


@pytest.mark.parametrize("rule", ["saliency", "backward", "exact"])
def test_rule_that_the_curvature_of_a_model_cannot_serve(rule):
    curvature = quadratic.MatrixFree(
        jax.tree_util.Partial(functools.partial(lambda: lambda v: v)), jnp.zeros(4)
    )
    model = quadratic.QuadraticModel(
        jnp.zeros(4), jnp.asarray(0.0), jnp.ones(4), curvature
    )
    with pytest.raises(ValueError, match="MatrixFree does not have"):
        sparserec.iobs(model, jnp.zeros(4), 1, mask_rule=rule)


def test_gauss_newton_without_targets():
    with pytest.raises(ValueError, match=r"args=\(\*inputs, targets\)"):
        sparserec.iobs(
            lambda p, x: jnp.sum(x @ p["kernel"]),
            PARAMS,
            1,
            args=ARGS[:1],
            curvature=PRODUCTS,
        )


@pytest.mark.parametrize("values", ["obs", "top_k"])
def test_curvature_that_is_not_positive_definite_without_damping(values):
    # Not an error: only the numbers say so. A status, and the words of `check`.
    model = quadratic.dense(
        jnp.diag(jnp.array([1.0, -1.0, 2.0, 3.0])), jnp.zeros(4), jnp.ones(4)
    )
    solution = sparserec.iobs(model, jnp.zeros(4), 2, damping=0.0, values=values)
    assert solution.status == Status.NOT_POSITIVE_DEFINITE
    assert int(jnp.sum(solution.mask)) == 2
    assert bool(jnp.all(jnp.isfinite(solution.params)))
    with pytest.raises(SolveError, match=r"at this `damping`.*damping='auto'"):
        sparserec.check(solution)


def test_surgery_on_a_curvature_without_an_inverse():
    model = quadratic.dense(jnp.diag(jnp.array([1.0, -1.0, 2.0, 3.0])), jnp.zeros(4))
    params = jnp.array([4.0, 3.0, 2.0, 1.0])
    solution = sparserec.obs(model, params, 2)
    assert solution.status == Status.NOT_POSITIVE_DEFINITE
    np.testing.assert_array_equal(solution.params, [4, 3, 0, 0])  # plain magnitudes
    np.testing.assert_allclose(solution.objective, (16 - 9) / 2)
