r"""Exact k largest magnitudes over a pytree, by counting alone.

Magnitudes are read as integers, which keep their order (`magnitude_codes`). The k-th
largest is found by bracketing (`_search`): every pass over the scores counts the
entries at or above several candidate thresholds, in one fused reduction, and keeps
the two candidates that enclose k. Nothing is sorted, joined or cumulated, so a
sharded leaf is only ever read in place. Three things keep the passes few: a strided
sample of a few thousand entries proposes the first candidates, later ones are
interpolated from the counts, and whenever a pass disappoints the next one cuts the
bracket into equal parts, which bounds the worst case. A poor guess costs a pass,
never the answer: brackets move by counts of all entries alone. Entries that tie at
the threshold are told apart by the same search over their flat index, which takes no
pass where all of them fit.

Legend: g groups of leaves that share a budget, c candidates counted in one pass.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, Num

Leaves: TypeAlias = tuple[Array, ...]
_Key: TypeAlias = Callable[[Array, Array], Array]

# Three bits a pass. On CPU a pass with 7 candidates costs as much as one over
# the plain sum of magnitudes; with 15 it costs twice that for one bit more.
_BITS = 3
_CANDIDATES = (1 << _BITS) - 1
# Below this size a pass is cheaper than the arithmetic of a better guess.
_INTERPOLATE_FROM = 1 << 14
# Below this size the passes saved cost less than searching the sample.
_SAMPLE_FROM = 1 << 19
_SAMPLE_SIZE = 1 << 13
_SAMPLE_LEAST = 32

_INTEGER = {2: jnp.int16, 4: jnp.int32, 8: jnp.int64}


class _Bracket(NamedTuple):
    """Keys that enclose the threshold of every group, with the entries at or above.

    `count_low >= target >= count_high` always holds. The search of a group ends when
    `high - low <= 1`: either one count has met its target (then `low >= high`), or
    the entries at `low` tie.
    """

    low: Int[Array, "g"]
    high: Int[Array, "g"]
    count_low: Num[Array, "g"]
    count_high: Num[Array, "g"]


def count_dtype(size: int) -> Any:
    """The narrowest of int32 and int64 that counts `size` entries."""
    if size < 1 << 31:
        return np.dtype(np.int32)
    if not jax.config.read("jax_enable_x64"):
        raise ValueError(
            f"{size} entries cannot be counted in int32; enable 64-bit types with "
            "`jax.config.update('jax_enable_x64', True)`, or select leaf by leaf."
        )
    return np.dtype(np.int64)


# --- magnitudes as integers ----------------------------------------------------------


def _infinity(dtype: Any) -> int:
    """Bit pattern of +inf."""
    bits = np.asarray(np.inf).astype(dtype).view(f"i{np.dtype(dtype).itemsize}")
    return int(bits)


INFINITY = {
    jnp.dtype(dtype): _infinity(dtype)
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)
}


def _widest(leaves: Leaves) -> Any:
    """The smallest supported dtype that holds the values of every leaf."""
    kinds = {leaf.dtype for leaf in leaves}
    if len(kinds) == 1:
        return kinds.pop()
    return jnp.dtype(jnp.float64 if jnp.dtype(jnp.float64) in kinds else jnp.float32)


def magnitude_codes(leaf: Array, dtype: Any) -> Int[Array, "..."]:
    """Magnitudes in `dtype` as integers that keep their order; NaN as zero.

    The bits of non-negative floats grow with their value. Integers are compared
    because compiled float arithmetic may treat subnormal numbers as zeros.
    """
    integer = _INTEGER[leaf.dtype.itemsize]
    infinity = INFINITY[leaf.dtype]
    bits = lax.bitcast_convert_type(leaf, integer) & jnp.iinfo(integer).max
    bits = jnp.where(bits > infinity, jnp.zeros((), integer), bits)
    if leaf.dtype != dtype:
        bits = _widen(bits, leaf.dtype, dtype)
    return bits.astype(jnp.int32) if dtype.itemsize == 2 else bits


def _widen(bits: Int[Array, "..."], narrow: Any, wide: Any) -> Int[Array, "..."]:
    """Codes of `wide` for the same magnitudes given as codes of `narrow`.

    Integer arithmetic throughout, for the reason given there: a normal number keeps
    its fraction and has its exponent re-biased; a subnormal one is the integer `bits`
    times the smallest subnormal, a product that is normal in `wide` (bfloat16 shares
    the exponents of float32: there a shift does for both).
    """
    source, target = jnp.finfo(narrow), jnp.finfo(wide)
    integer = _INTEGER[wide.itemsize]
    shift = target.nmant - source.nmant
    bias = (1 << (target.nexp - 1)) - (1 << (source.nexp - 1))
    raised = bits.astype(integer)
    wider = (raised << shift) + (bias << target.nmant)
    if bias:
        unit = np.asarray(source.smallest_subnormal).astype(wide)
        product = lax.bitcast_convert_type(raised.astype(wide) * unit, integer)
        wider = jnp.where(raised >> source.nmant == 0, product, wider)
    infinite = jnp.asarray(INFINITY[wide], integer)
    return jnp.where(raised == INFINITY[narrow], infinite, wider)


# --- the search ----------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="groups")
def support_of(
    leaves: Leaves, counts: Array | np.integer, groups: tuple[int, ...]
) -> Leaves:
    """One mask per leaf; see `support`. `counts` may be a scalar for one group."""
    leaves = lax.stop_gradient(leaves)  # a support has no derivative
    owners = tuple(g for g in groups if g >= 0)
    chosen = tuple(leaf for leaf, g in zip(leaves, groups, strict=True) if g >= 0)
    found = iter(_select(chosen, jnp.reshape(counts, -1), owners) if chosen else ())
    return tuple(
        next(found) if g >= 0 else jnp.ones(leaf.shape, bool)
        for leaf, g in zip(leaves, groups, strict=True)
    )


def _select(leaves: Leaves, counts: Array, owners: tuple[int, ...]) -> list[Array]:
    """Masks of leaves that all have a group: search the codes, then the ties."""
    sizes = np.zeros(counts.size, np.int64)
    np.add.at(sizes, list(owners), [leaf.size for leaf in leaves])
    integer = count_dtype(int(sizes.max()))
    sizes = sizes.astype(integer)
    # Clipped before the cast: a uint32 may not fit into the signed type.
    limit = min(int(sizes.max()), int(jnp.iinfo(counts.dtype).max))
    target = jnp.minimum(jnp.clip(counts, 0, limit).astype(integer), sizes)
    interpolate = int(sizes.max()) >= _INTERPOLATE_FROM
    zeros = jnp.zeros_like(target)

    dtype = _widest(leaves)
    values: list[_Key] = [lambda leaf, _: magnitude_codes(leaf, dtype)] * len(leaves)
    above_all = jnp.full(
        target.shape, INFINITY[dtype] + 1, _INTEGER[max(dtype.itemsize, 4)]
    )
    bracket = _Bracket(jnp.zeros_like(above_all), above_all, jnp.asarray(sizes), zeros)
    guess = None
    if int(sizes.max()) >= _SAMPLE_FROM:
        guess = _guess(leaves, owners, sizes, target, bracket, dtype)
    count = functools.partial(_count, leaves, owners, values, integer)
    value = _search(count, target, bracket, interpolate, guess)

    # Entries from `value.high` up are in. Of those from `value.low` up to it, which
    # all tie unless the count was met, the first few are: the later, the lower.
    ends = np.zeros_like(sizes)
    places = []
    for leaf, g in zip(leaves, owners, strict=True):
        places.append(
            functools.partial(_place, value, g, dtype, sizes[g] - 1 - ends[g])
        )
        ends[g] += leaf.size
    bracket = _Bracket(
        zeros, jnp.asarray(sizes), value.count_low - value.count_high, zeros
    )
    count = functools.partial(_count, leaves, owners, places, integer)
    place = _search(count, target - value.count_high, bracket, interpolate, None)
    zero = jnp.zeros((), integer)
    return [
        (magnitude_codes(leaf, dtype) >= value.high[g])
        | (key(leaf, zero) >= place.high[g])
        for leaf, g, key in zip(leaves, owners, places, strict=True)
    ]


def _place(
    value: _Bracket, g: int, dtype: Any, first: np.integer, leaf: Array, zero: Array
) -> Array:
    """Keys of the entries that tie, falling with the flat index; -1 for all others.

    `zero` is 0. An index that starts from it belongs to the pass, see `_count`.
    """
    index = zero
    for axis, length in enumerate(leaf.shape):
        index = index * length + lax.broadcasted_iota(zero.dtype, leaf.shape, axis)
    code = magnitude_codes(leaf, dtype)
    ties = (code >= value.low[g]) & (code < value.high[g])
    return jnp.where(ties, first - index, -1)


def _count(
    leaves: Leaves,
    owners: tuple[int, ...],
    keys: list[_Key],
    integer: Any,
    candidates: Int[Array, "g c"],
) -> Int[Array, "g c"]:
    """Entries of every group at or above its candidates.

    The barrier ties the leaves to the candidates of this pass. Without it the
    compiler computes the keys once, ahead of the loop, and has to write a copy of
    every leaf to memory: slower than computing them again in each pass.
    """
    zero = jnp.zeros((), integer)
    leaves, zero, candidates = lax.optimization_barrier((leaves, zero, candidates))
    totals = [jnp.zeros(candidates.shape[1], integer)] * candidates.shape[0]
    for leaf, g, key in zip(leaves, owners, keys, strict=True):
        totals[g] = totals[g] + _tally(key(leaf, zero), candidates[g], integer)
    return jnp.stack(totals)


def _add(left: tuple[Array, ...], right: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(map(lax.add, left, right))


def _tally(keys: Array, candidates: Int[Array, "c"], integer: Any) -> Int[Array, "c"]:
    """Keys at or above every candidate, all counted in one reduction.

    One reduction with several operands compiles to vector code on CPU; the sum of a
    comparison, alone or broadcast over the candidates, was found ten times slower.
    """
    hits = tuple((keys >= bound).astype(integer) for bound in candidates)
    zeros = (np.zeros((), integer),) * len(hits)
    return jnp.stack(lax.reduce(hits, zeros, _add, tuple(range(keys.ndim))))


def _search(
    count: Callable[[Array], Array],
    target: Num[Array, "g"],
    bracket: _Bracket,
    interpolate: bool,
    guess: Int[Array, "g c"] | None,
) -> _Bracket:
    """Narrow the brackets of all groups until each holds its threshold.

    Args:
      count: entries at or above each of `(g, c)` candidates; never rising with them.
      target: counts wanted.
      bracket: keys that enclose the thresholds.
      interpolate: whether to follow the counts; otherwise equal parts only.
      guess: first candidates, or None.

    Returns:
      The final brackets, see `_Bracket`.
    """
    bracket = _met(bracket, target)

    def unfinished(state: tuple[_Bracket, Array]) -> Array:
        return jnp.any(state[0].high - state[0].low > 1)

    def one_pass(state: tuple[_Bracket, Array]) -> tuple[_Bracket, Array]:
        old, candidates = state
        new = _narrow(old, target, candidates, count(candidates))
        proposal = _equal_parts(new)
        if interpolate:
            # Equal parts leave an eighth of the keys; a guess that leaves more than
            # an eighth of the entries between the bounds has earned no second try.
            inside = new.count_low - new.count_high
            stalled = inside > (old.count_low - old.count_high) >> _BITS
            proposal = jnp.where(stalled[:, None], proposal, _by_counts(new, target))
        return new, proposal

    first = _equal_parts(bracket) if guess is None else guess
    return lax.while_loop(unfinished, one_pass, (bracket, first))[0]


def _narrow(
    bracket: _Bracket, target: Array, candidates: Array, counts: Array
) -> _Bracket:
    """The tightest bracket known after the candidates were counted."""
    wanted = target[:, None]
    low, high, count_low, count_high = (x[:, None] for x in bracket)
    enough, few = counts >= wanted, counts <= wanted
    return _Bracket(
        low=jnp.max(jnp.where(enough, jnp.maximum(candidates, low), low), axis=1),
        high=jnp.min(jnp.where(few, jnp.minimum(candidates, high), high), axis=1),
        count_low=jnp.min(jnp.where(enough, counts, count_low), axis=1),
        count_high=jnp.max(jnp.where(few, counts, count_high), axis=1),
    )


def _met(bracket: _Bracket, target: Array) -> _Bracket:
    """Closed where the count at one end meets its target."""
    low, high, count_low, count_high = bracket
    at_low, at_high = count_low <= target, count_high >= target
    ends = jnp.where(at_high, high, low), jnp.where(at_low, low, high)
    most = jnp.where(at_high, count_high, count_low)
    return _Bracket(*ends, most, jnp.where(at_low, count_low, count_high))


def _equal_parts(bracket: _Bracket) -> Int[Array, "g c"]:
    """Candidates that cut the keys of a bracket into equal parts."""
    low, width = bracket.low[:, None], (bracket.high - bracket.low)[:, None]
    steps = jnp.arange(1, _CANDIDATES + 1, dtype=low.dtype)[None]
    # Not `width * steps // parts`, which would overflow; shifts compile faster.
    offsets = (width >> _BITS) * steps + ((width & _CANDIDATES) * steps >> _BITS)
    return low + jnp.clip(offsets, 1, jnp.maximum(width - 1, 1))


def _by_counts(bracket: _Bracket, target: Array) -> Int[Array, "g c"]:
    r"""Candidates around the place where the counts let one expect the threshold.

    With N entries spread evenly over the bracket, the entry wanted lies at the
    fraction f of it, give or take $\sqrt{f (1 - f) / N}$. Two candidates stand
    within that error, two at about twice it, and two at $N^{-1/4}$ in case the
    density changes over the bracket.
    """
    real = jnp.float64 if bracket.low.dtype == jnp.int64 else jnp.float32
    width = bracket.high - bracket.low
    inside = jnp.maximum(bracket.count_low - bracket.count_high, 1).astype(real)
    fraction = (bracket.count_low - target).astype(real) / inside
    error = jnp.sqrt((fraction * (1 - fraction) + 1 / inside) / inside)
    near, far = error[:, None], (inside**-0.25)[:, None]
    sides = jnp.asarray([-1, 1], real)[None]
    offsets = jnp.concatenate(
        [far * sides, 2.2 * near * sides, 0.6 * near * sides, 0 * near], axis=1
    )
    places = jnp.clip(fraction[:, None] + offsets, 0, 1) * width.astype(real)[:, None]
    last = jnp.maximum(width - 1, 1)[:, None]
    return bracket.low[:, None] + jnp.clip(places.astype(width.dtype), 1, last)


def _guess(
    leaves: Leaves,
    owners: tuple[int, ...],
    sizes: np.ndarray,
    target: Int[Array, "g"],
    bracket: _Bracket,
    dtype: Any,
) -> Int[Array, "g c"]:
    """First candidates: where a strided sample expects the thresholds.

    A sample entry stands for as many entries as its leaf has per sample entry. The
    candidates span the sample's thresholds for the targets plus and minus three
    standard errors of a count by sampling, and hold both codes next to the one for
    the target itself: where many entries tie, that settles the search at once.
    """
    drawn = np.zeros(sizes.shape)
    samples = []
    for leaf, g in zip(leaves, owners, strict=True):
        wanted = leaf.size * _SAMPLE_SIZE // max(int(sizes[g]), 1)
        if wanted < _SAMPLE_LEAST:
            continue  # too few entries to matter; each leaf costs compile time
        sample = _strided(leaf, wanted)
        samples.append((magnitude_codes(sample, dtype), g, leaf.size / sample.size))
        drawn[g] += sample.size

    def count(candidates: Array) -> Array:
        totals = [jnp.zeros(_CANDIDATES, jnp.float32)] * sizes.size
        for sample, g, weight in samples:
            tally = _tally(sample, candidates[g], np.dtype(np.int32))
            totals[g] = totals[g] + weight * tally.astype(jnp.float32)
        return jnp.stack(totals)

    size = jnp.asarray(sizes, jnp.float32)
    number = jnp.asarray(np.maximum(drawn, 1), jnp.float32)
    wanted = target.astype(jnp.float32)
    share = wanted / jnp.maximum(size, 1)
    error = size * jnp.sqrt((share * (1 - share) + 1 / number) / number)
    around = [wanted + 3 * error, wanted, wanted - 3 * error]
    whole = bracket._replace(count_low=size, count_high=jnp.zeros_like(size))
    search = jax.vmap(lambda t: _search(count, t, whole, False, None))
    found = search(jnp.stack([jnp.clip(t, 0, size) for t in around]))
    low, middle, above, high = found.low[0], found.low[1], found.high[1], found.high[2]
    third = (high - above) // 3
    guess = [low, low + (middle - low) // 2, middle, above]
    guess += [above + third, above + 2 * third, high]
    return jnp.stack(guess, axis=1)


def _strided(leaf: Array, wanted: int) -> Array:
    """About `wanted` entries of a leaf on a regular grid, short axes kept whole."""
    strides, left = [1] * leaf.ndim, float(wanted)
    by_length = sorted(range(leaf.ndim), key=leaf.shape.__getitem__)
    for done, axis in enumerate(by_length):
        share = math.ceil(left ** (1 / (leaf.ndim - done)))
        strides[axis] = max(1, leaf.shape[axis] // max(share, 1))
        left = max(left / max(-(-leaf.shape[axis] // strides[axis]), 1), 1.0)
    return lax.slice(leaf, (0,) * leaf.ndim, leaf.shape, strides)
