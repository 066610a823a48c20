"""The one loop, driven by solvers whose every step is written down beforehand."""

import functools
import itertools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import sparserec
from sparserec import Solution, SolveError, Solver, State, Status, check
from sparserec._run import Incumbent, _run_compiled, _signature, kept
from sparserec.budget import make_budget

STEPS = 6
TOL = 1e-4


class Script(NamedTuple):
    """What a solver says after each step; every field has a leading axis of steps."""

    params: Any  # (steps, 3); its support is where it is not zero
    objective: Any
    change: Any
    stationarity: Any
    settled: Any
    failure: Any


def script(objective, **changes):
    """A script with these objectives that goes on for ever, except for what is said."""
    moving = np.arange(1.0, STEPS + 1)[:, None] * np.array([[1.0, 0.0, 1.0]])
    plain = Script(
        params=moving,
        objective=objective,
        change=np.ones(STEPS),
        stationarity=np.ones(STEPS),
        settled=np.ones(STEPS, bool),
        failure=np.full(STEPS, int(Status.RUNNING)),
    )
    filled = plain._replace(**changes)
    dtypes = (float, float, float, float, bool, np.int32)
    return Script(*(np.asarray(x, d) for x, d in zip(filled, dtypes, strict=True)))


def scripted_state(lines, index):
    line = jax.tree.map(lambda x: x[index], lines)
    return State(
        params=line.params,
        mask=line.params != 0,
        objective=line.objective,
        change=line.change,
        stationarity=line.stationarity,
        damping=line.objective / 8,
        settled=line.settled,
        failure=line.failure,
    )


def scripted_init(lines, first, params, budget, args):
    del budget, args
    state = scripted_state(lines, jnp.int32(0))
    running = jnp.int32(Status.RUNNING)
    state = state._replace(params=params, objective=first, failure=running)
    return state, Incumbent(params, params != 0, first)


def scripted_step(lines, state, budget, args, index):
    del state, budget, args
    return scripted_state(lines, index)


def scripted_solver(lines, first=10.0):
    first = jnp.asarray(first, float)
    return Solver(
        init=Partial(scripted_init, lines, first), step=Partial(scripted_step, lines)
    )


START = jnp.array([-1.0, 0.0, 0.0])
BUDGET = make_budget(2, START)


def play(lines, first=10.0, tol=TOL, *, on_host=False):
    return sparserec.run(
        scripted_solver(lines, first),
        START,
        BUDGET,
        tol=tol,
        max_steps=STEPS,
        on_host=on_host,
    )


def at(index, *values):
    """Ones, with values from `index` on."""
    array = np.ones(STEPS)
    array[index : index + len(values)] = values
    return array


FALLING = np.array([5.0, 4.0, 3.0, 2.0, 1.0, 0.5])
SMALL = at(2, 1e-5)  # below the tolerance in step 2 only
EVEN, ODD, OTHER = np.eye(3)
ALTERNATING = np.stack([EVEN, ODD] * 3)

# name -> script, start objective, status, steps taken, index of the answer (-1: start)
ENDINGS: dict[str, tuple] = {
    "all steps": (script(FALLING), 10.0, Status.MAX_STEPS, 6, 5),
    "converged": (
        script(FALLING, change=SMALL, stationarity=SMALL),
        10.0,
        Status.CONVERGED,
        3,
        2,
    ),
    "stationarity need only be below the root of tol": (
        script(FALLING, change=SMALL, stationarity=at(2, 0.99e-2)),
        10.0,
        Status.CONVERGED,
        3,
        2,
    ),
    "small change is not enough": (
        script(FALLING, change=SMALL, stationarity=at(2, 1.01e-2)),
        10.0,
        Status.MAX_STEPS,
        6,
        5,
    ),
    "converged only at the final budget": (
        script(
            FALLING,
            change=at(2, 0, 0, 0),
            stationarity=at(2, 0, 0, 0),
            settled=at(0, 0, 0, 0),
        ),
        10.0,
        Status.CONVERGED,
        4,
        3,
    ),
    "best of the settled ones": (
        script(np.array([0.1, 5, 3, 4, 3, 6]), settled=at(0, 0)),
        10.0,
        Status.MAX_STEPS,
        6,
        2,
    ),
    "nothing beats the start": (script(FALLING), 0.1, Status.MAX_STEPS, 6, -1),
    "nothing settles": (
        script(FALLING, settled=np.zeros(STEPS)),
        10.0,
        Status.MAX_STEPS,
        6,
        -1,
    ),
    "loss becomes NaN": (
        script(np.where(np.arange(STEPS) == 3, np.nan, FALLING)),
        10.0,
        Status.NONFINITE,
        4,
        2,
    ),
    "loss becomes infinite at once": (
        script(np.full(STEPS, -np.inf)),
        10.0,
        Status.NONFINITE,
        1,
        -1,
    ),
    "params become NaN": (
        script(
            FALLING, params=np.where(np.arange(STEPS) < 2, 1, np.nan)[:, None] * EVEN
        ),
        10.0,
        Status.NONFINITE,
        3,
        1,
    ),
    "not finite before it is converged": (
        script(
            np.where(np.arange(STEPS) == 2, np.nan, FALLING),
            change=SMALL,
            stationarity=SMALL,
        ),
        10.0,
        Status.NONFINITE,
        3,
        1,
    ),
    "start is not finite": (script(FALLING), np.nan, Status.NONFINITE, 0, -1),
    "solver gives up": (
        script(FALLING, failure=at(2, Status.NOT_POSITIVE_DEFINITE) * (SMALL < 1)),
        10.0,
        Status.NOT_POSITIVE_DEFINITE,
        3,
        2,
    ),
    "supports alternate": (
        script(np.array([3.0, 4, 3, 4, 3, 4]), params=ALTERNATING),
        10.0,
        Status.CYCLED,
        3,
        0,
    ),
    "supports alternate with progress": (
        script(FALLING, params=ALTERNATING),
        10.0,
        Status.MAX_STEPS,
        6,
        5,
    ),
    "a longer cycle": (
        script(np.full(STEPS, 3.0), params=np.stack([EVEN, ODD, OTHER] * 2)),
        10.0,
        Status.CYCLED,
        4,
        0,
    ),
    "one support for ever is no cycle": (
        script(np.full(STEPS, 3.0)),
        10.0,
        Status.MAX_STEPS,
        6,
        0,
    ),
    "no cycle while the budget moves": (
        script(np.full(STEPS, 3.0), params=ALTERNATING, settled=np.zeros(STEPS)),
        10.0,
        Status.MAX_STEPS,
        6,
        -1,
    ),
}
endings = pytest.mark.parametrize("name", ENDINGS)


def assert_ends_as_written(solution, name):
    lines, first, status, steps, best = ENDINGS[name]
    params = START if best < 0 else lines.params[best]
    assert Status(int(solution.status)).name == status.name
    assert solution.iterations == steps
    assert solution.converged == (status == Status.CONVERGED)
    np.testing.assert_array_equal(solution.params, params)
    np.testing.assert_array_equal(solution.mask, params != 0)
    np.testing.assert_array_equal(
        solution.objective, first if best < 0 else lines.objective[best]
    )


@endings
def test_how_a_run_ends(name):
    assert_ends_as_written(play(*ENDINGS[name][:2]), name)


@endings
def test_history_is_what_happened_and_then_nan(name):
    lines, first, _, steps, _ = ENDINGS[name]
    history = play(lines, first).history

    def record(values):
        return np.where(np.arange(STEPS) < steps, values, np.nan)

    np.testing.assert_array_equal(history.objective, record(lines.objective))
    np.testing.assert_array_equal(history.change, record(lines.change))
    np.testing.assert_array_equal(history.damping, record(lines.objective / 8))
    np.testing.assert_array_equal(
        history.kept, record(np.sum(lines.params != 0, axis=1))
    )


def test_lanes_of_a_batch_end_one_by_one():
    lines = jax.tree.map(
        lambda *x: np.stack(x), *(case[0] for case in ENDINGS.values())
    )
    firsts = np.array([case[1] for case in ENDINGS.values()])
    solutions = jax.jit(jax.vmap(play))(lines, firsts)
    for lane, name in enumerate(ENDINGS):
        solution = jax.tree.map(lambda x: x[lane], solutions)  # noqa: B023
        assert_ends_as_written(solution, name)
        expected = play(*ENDINGS[name][:2]).history
        jax.tree.map(np.testing.assert_array_equal, solution.history, expected)


@pytest.mark.parametrize(
    "name", ["converged", "loss becomes NaN", "start is not finite"]
)
def test_loop_on_the_host_is_the_same(name):
    solution = play(*ENDINGS[name][:2], on_host=True)
    assert_ends_as_written(solution, name)
    expected = play(*ENDINGS[name][:2]).history
    jax.tree.map(np.testing.assert_array_equal, solution.history, expected)


def programs() -> int:
    """Programs that the loop has been compiled to so far."""
    return cast(Any, _run_compiled)._cache_size()


def test_all_these_runs_are_one_program():
    play(script(FALLING))
    before = programs()
    for tol, (lines, first, *_) in zip(
        itertools.count(1), ENDINGS.values(), strict=False
    ):
        play(lines, first, tol * 1e-5)
    assert programs() == before


def test_tolerance_counts():
    lines = script(FALLING, change=FALLING, stationarity=np.zeros(STEPS))
    assert [int(play(lines, tol=tol).iterations) for tol in (4.0, 2.5, 0.1)] == [
        2,
        4,
        6,
    ]


# --- fresh data ----------------------------------------------------------------------


def follow_init(params, budget, args):
    del budget
    (target,) = args
    state = State(
        params=params,
        mask=params != 0,
        objective=jnp.sum((params - target) ** 2),
        change=jnp.asarray(1.0),
        stationarity=jnp.asarray(1.0),
        damping=jnp.asarray(jnp.nan),
        settled=jnp.asarray(True),
        failure=jnp.int32(Status.RUNNING),
        memory=target,
    )
    return state, Incumbent(params, params != 0, state.objective)


def follow_step(state, budget, args, index):
    """Goes to the data; the loss is larger at every step, as data may have it."""
    del budget
    (target,) = args
    return state._replace(
        params=target,
        mask=target != 0,
        objective=index.astype(float),
        change=jnp.sum(jnp.abs(target - state.params)),
        memory=target,
    )


FOLLOWER = Solver(Partial(follow_init), Partial(follow_step))
BATCHES = (jnp.asarray(ALTERNATING),)
follow = functools.partial(
    sparserec.run, FOLLOWER, START, BUDGET, tol=0.0, max_steps=STEPS
)


def test_batches_as_a_function_or_stacked():
    asked = []

    def batch(step):
        asked.append(step)
        return (BATCHES[0][step],)

    stacked, called = follow(batches=BATCHES), follow(batches=batch)
    jax.tree.map(np.testing.assert_array_equal, stacked, called)
    assert asked == list(range(STEPS))  # each once, in order
    on_host = follow(batches=BATCHES, on_host=True)
    jax.tree.map(np.testing.assert_array_equal, stacked, on_host)


def test_last_iterate_is_the_answer_on_fresh_data():
    # Neither are losses compared, nor is a support that returns a cycle.
    solution = follow(batches=BATCHES)
    np.testing.assert_array_equal(solution.params, ALTERNATING[-1])
    assert solution.objective == STEPS - 1
    assert solution.status == Status.MAX_STEPS


def test_same_data_at_every_step():
    solution = follow((jnp.asarray(EVEN),))
    np.testing.assert_array_equal(solution.params, EVEN)
    np.testing.assert_array_equal(solution.history.change, [3 - 1, 0, 0, 0, 0, 0])
    assert solution.objective == 0  # the first visit


# --- supports ------------------------------------------------------------------------


def test_signatures_tell_supports_apart():
    subsets = np.array(list(itertools.product([False, True], repeat=10)))
    masks = {"a": jnp.asarray(subsets[:, :4]), "b": jnp.asarray(subsets[:, 4:])}
    signatures = jax.vmap(_signature)(masks)
    assert len(set(np.asarray(signatures).tolist())) == len(subsets)


def test_only_prunable_weights_are_counted():
    mask = {
        "a": jnp.ones(3, bool),
        "b": jnp.array([True, False]),
        "c": jnp.zeros(2, bool),
    }
    assert kept(mask, (-1, 0, 1)) == 1
    assert kept(mask, (0, 0, -1)) == 4


# --- check ---------------------------------------------------------------------------


def solved(status, steps=7):
    # Only status and number of steps are looked at.
    blank = play(script(FALLING))
    return blank._replace(status=jnp.int32(status), iterations=jnp.int32(steps))


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (Status.NONFINITE, r"NONFINITE: a NaN .* after 7 step.*`step_size`"),
        (Status.NOT_POSITIVE_DEFINITE, "at this `damping`.*after 7 step.*'auto'"),
        (Status.CYCLED, "CYCLED: .* repeat .*after 7 step"),
        (Status.MAX_STEPS, "`max_steps` = 7 .*allow_max_steps=True"),
        (Status.RUNNING, "never ran"),
    ],
)
def test_check_says_why_and_what_to_do(status, words):
    with pytest.raises(SolveError, match=words):
        check(solved(status))


def test_check_passes_what_is_good():
    good = solved(Status.CONVERGED)
    assert check(good) is good
    full = solved(Status.MAX_STEPS)
    assert check(full, allow_max_steps=True) is full
    with pytest.raises(SolveError, match="CYCLED"):
        check(solved(Status.CYCLED), allow_max_steps=True)


def test_check_names_the_lane():
    codes = [Status.CONVERGED, Status.MAX_STEPS, Status.NONFINITE, Status.CONVERGED]
    batch = solved(0)._replace(
        status=jnp.array(codes, jnp.int32), iterations=jnp.arange(4, dtype=jnp.int32)
    )
    with pytest.raises(SolveError, match=r"MAX_STEPS \(lane 1 of 4\).*= 1 step"):
        check(batch)
    with pytest.raises(SolveError, match=r"NONFINITE \(lane 2 of 4\).*after 2 step"):
        check(batch, allow_max_steps=True)
    square = jax.tree.map(lambda x: x.reshape(2, 2), (batch.status, batch.iterations))
    with pytest.raises(SolveError, match="lane 2 of 4"):
        check(
            batch._replace(status=square[0], iterations=square[1]), allow_max_steps=True
        )


def test_check_needs_a_status_that_can_be_read():
    def checked(status) -> Solution:
        return check(solved(Status.CONVERGED)._replace(status=status))

    for transform in (jax.jit, jax.vmap):
        with pytest.raises(TypeError, match=r"outside `jax\.jit` and `jax\.vmap`"):
            transform(checked)(jnp.ones(2, jnp.int32))
