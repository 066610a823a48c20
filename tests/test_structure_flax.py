"""Groups of linen and nnx modules, and what follows the units of a network."""

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from structure_cases import masked, random_keep, separate_attention

from sparserec import structure

# The modules are other people's code and rely on implicit promotion.
pytestmark = pytest.mark.usefixtures("lenient_promotion")


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(8)(x))
        x = nn.relu(nn.Dense(10)(x))
        return nn.Dense(3)(x)


class Block(nn.Module):
    width: int
    train: bool
    stride: int = 1

    @nn.compact
    def __call__(self, x):
        def norm(h):
            return nn.BatchNorm(use_running_average=not self.train)(h)

        h = nn.Conv(self.width, (3, 3), self.stride, use_bias=False)(x)
        h = norm(nn.Conv(self.width, (3, 3), use_bias=False)(nn.relu(norm(h))))
        if x.shape != h.shape:
            x = norm(nn.Conv(self.width, (1, 1), self.stride, use_bias=False)(x))
        return nn.relu(x + h)


class ResNet(nn.Module):
    train: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not self.train)(x))
        x = Block(6, self.train)(x)
        x = Block(9, self.train, 2)(x)
        return nn.Dense(4)(x.mean((1, 2)))


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(13, 12)
        x = embed(tokens)
        x = x + self.param("position", nn.initializers.normal(), (1, 5, 12))
        for _ in range(2):
            h = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=3, qkv_features=18)(h, h)
            h = nn.Dense(20)(nn.LayerNorm()(x))
            x = x + nn.Dense(12)(nn.gelu(h))
        return embed.attend(nn.LayerNorm()(x))


def drawn(tree, seed=0):
    """Random parameters for given shapes, away from zeros and ones."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        fan = int(np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 16
        values = rng.normal(size=leaf.shape) / np.sqrt(fan)
        name = jax.tree_util.keystr(path)
        positive = "scale" in name or "var" in name
        return jnp.asarray(1 + abs(values) if positive else values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, tree)


def linen(module, *args):
    variables = drawn(jax.eval_shape(module.init, jax.random.key(0), *args))

    def apply_fn(variables, *args):
        out = module.apply(variables, *args, mutable=["batch_stats"])
        return out[0]

    return apply_fn, variables


class Grouped(nn.Module):
    """A depthwise convolution between two others."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (1, 1))(x))
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=8)(x))
        return nn.Conv(2, (1, 1))(x).mean(axis=(1, 2))


class Embedded(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(3)(nn.relu(nn.Embed(13, 12)(tokens)))


class AttentionNet(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=2, in_features=8, qkv_features=12, decode=False, rngs=rngs
        )

    def __call__(self, x):
        return x + self.attention(self.norm(x))


class ConvolutionNet(nnx.Module):
    """A depthwise convolution and a normalization between two others."""

    def __init__(self, rngs):
        self.first = nnx.Conv(3, 8, (1, 1), rngs=rngs)
        self.each = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.last = nnx.Conv(8, 2, (1, 1), rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.each(nnx.relu(self.first(x))))
        return self.last(self.norm(x)).mean(axis=(1, 2))


def places(groups):
    return {
        frozenset((m.path.removeprefix("params/"), m.axis) for m in group.members)
        for group in groups.groups
    }


def test_linen_mlp():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 6)), jnp.float32)
    apply_fn, variables = linen(Mlp(), x)
    groups = structure.groups(apply_fn, variables, x)
    assert places(groups) == {
        frozenset({("Dense_0/kernel", 1), ("Dense_0/bias", 0), ("Dense_1/kernel", 0)}),
        frozenset({("Dense_1/kernel", 1), ("Dense_1/bias", 0), ("Dense_2/kernel", 0)}),
    }
    keep = random_keep(groups.sizes)
    structure.check(apply_fn, variables, groups, keep, x, tol=2e-6)


@pytest.mark.parametrize("train", [False, True])
def test_batch_normalized_resnet(train):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 8, 3)), jnp.float32)
    apply_fn, variables = linen(ResNet(train), x)
    groups = structure.groups(apply_fn, variables, x)
    assert sorted(groups.sizes.values()) == [6, 6, 9, 9]
    stage = {
        "params/Conv_0/kernel",
        "params/BatchNorm_0/scale",
        "params/BatchNorm_0/bias",
        "params/Block_0/Conv_0/kernel",
        "params/Block_0/Conv_1/kernel",
        "params/Block_0/BatchNorm_1/scale",
        "params/Block_0/BatchNorm_1/bias",
        "params/Block_1/Conv_0/kernel",
        "params/Block_1/Conv_2/kernel",
    }
    if not train:  # the running statistics are only read in evaluation mode
        for name in ("BatchNorm_0", "Block_0/BatchNorm_1"):
            stage |= {f"batch_stats/{name}/mean", f"batch_stats/{name}/var"}
    paths = [{member.path for member in group.members} for group in groups.groups]
    assert any(stage <= each for each in paths)
    keep = random_keep(groups.sizes)
    structure.check(apply_fn, variables, groups, keep, x, tol=2e-6)


def test_transformer_excludes_the_residual_stream():
    tokens = jnp.array([[1, 2, 3, 4, 5], [0, 12, 7, 7, 1]])
    apply_fn, variables = linen(Transformer(), tokens)
    groups = structure.groups(apply_fn, variables, tokens)
    assert sorted(groups.sizes.values()) == [3, 3, 6, 6, 6, 6, 20, 20]
    assert not groups.unknown
    reasons = {f.reason for f in groups.frozen if f.path == "params/Dense_0/kernel"}
    assert any("mean" in reason and "inexact=True" in reason for reason in reasons)
    keep = random_keep(groups.sizes)
    structure.check(apply_fn, variables, groups, keep, tokens, tol=2e-6)
    assert sum(group.temperature for group in groups.groups) == 2


def test_residual_stream_on_request():
    tokens = jnp.array([[1, 2, 3, 4, 5]])
    apply_fn, variables = linen(Transformer(), tokens)
    groups = structure.groups(apply_fn, variables, tokens, inexact=True)
    (stream,) = [group for group in groups.groups if group.inexact]
    assert stream.size == 12
    # Linen computes the variance from the mean square, so dropped dimensions drop
    # out of both sums and only the divisor remembers them.
    keep = random_keep(groups.sizes)
    structure.check(apply_fn, variables, groups, keep, tokens, tol=2e-6)


def test_nnx_mlp_runs_on_smaller_arrays():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(6, 8, rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.last = nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x):
            return self.last(nnx.relu(self.norm(self.first(x))))

    net = Net(nnx.Rngs(0))
    net.eval()
    graph, state = nnx.split(net)
    state = drawn(state)

    def apply_fn(state, x):
        return nnx.merge(graph, state)(x)

    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 6)), jnp.float32)
    groups = structure.groups(apply_fn, state, x)
    assert groups.sizes == {"first/bias:0": 8}
    paths = {member.path for member in groups.groups[0].members}
    assert "norm/mean" in paths
    keep = random_keep(groups.sizes)
    structure.check(apply_fn, state, groups, keep, x, tol=2e-6)
    small = structure.shrink(state, groups, keep)
    expected = jax.jit(structure.resized(apply_fn, groups, keep))(small, x)
    np.testing.assert_allclose(
        jax.jit(apply_fn)(small, x), expected, rtol=1e-5, atol=1e-6
    )


def test_nnx_attention():
    graph, state = nnx.split(AttentionNet(nnx.Rngs(0)))
    state = drawn(state)

    def apply_fn(state, x):
        return nnx.merge(graph, state)(x)

    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 8)), jnp.float32)
    groups = structure.groups(apply_fn, state, x)
    assert sorted(groups.sizes.values()) == [2, 6, 6]
    keep = random_keep(groups.sizes)
    structure.check(apply_fn, state, groups, keep, x, tol=2e-6)


def test_optimizer_state_shrinks_and_training_goes_on():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 6)), jnp.float32)
    apply_fn, variables = linen(Mlp(), x)
    groups = structure.groups(apply_fn, variables, x)
    keep = random_keep(groups.sizes)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))

    def loss_fn(function, variables, x):
        return jnp.square(function(variables, x)).mean()

    state = optimizer.init(variables)
    gradient = jax.jit(jax.grad(lambda p, x: loss_fn(apply_fn, p, x)))
    update = jax.jit(optimizer.update)
    mask = structure.mask(variables, groups, keep)
    _, state = update(gradient(variables, x), state, variables)
    small = structure.shrink(variables, groups, keep)
    small_state = structure.shrink(state, groups, keep)
    assert jax.tree.structure(small_state) == jax.tree.structure(state)
    assert [leaf.shape for leaf in jax.tree.leaves(small_state)] == [
        leaf.shape for leaf in jax.tree.leaves(optimizer.init(small))
    ]
    # The loss is another function of the same parameters, here with another batch.
    small_loss = structure.resized(lambda p, x: loss_fn(apply_fn, p, x), groups, keep)
    small_gradient = jax.jit(jax.grad(small_loss))(small, x[:3])
    updates, _ = update(small_gradient, small_state, small)
    zeroed = masked(variables, mask)
    dense_gradient = masked(gradient(zeroed, x[:3]), mask)
    dense_updates, _ = update(dense_gradient, masked_state(state, mask), zeroed)
    expected = structure.shrink(dense_updates, groups, keep)
    for left, right in zip(*map(jax.tree.leaves, (updates, expected)), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-7)


def masked_state(state, mask):
    same = jax.tree.structure(mask)

    def matches(tree):
        return jax.tree.structure(tree) == same

    return jax.tree.map(
        lambda t: masked(t, mask) if matches(t) else t, state, is_leaf=matches
    )


TOKENS = np.array([[1, 2, 3, 4, 5], [0, 12, 7, 7, 1]])
LINEN = {
    "mlp": (Mlp, np.random.default_rng(0).normal(size=(5, 6))),
    "resnet": (ResNet, np.random.default_rng(0).normal(size=(3, 8, 8, 3))),
    "grouped": (Grouped, np.random.default_rng(0).normal(size=(2, 6, 6, 3))),
    "transformer": (Transformer, TOKENS),
    "embedding": (Embedded, TOKENS),
}


@pytest.mark.parametrize("name", LINEN)
def test_linen_code_runs_on_smaller_arrays(name):
    make, values = LINEN[name]
    dtype = jnp.int32 if values is TOKENS else jnp.float32
    x = jnp.asarray(values, dtype)
    apply_fn, variables = linen(make(), x)
    groups = structure.groups(apply_fn, variables, x)
    keep = random_keep(groups.sizes)
    small = structure.shrink(variables, groups, keep)
    expected = structure.resized(apply_fn, groups, keep)(small, x)
    with pytest.raises(flax.errors.FlaxError):
        apply_fn(small, x)
    corrected = structure.keep_temperature(variables, groups, keep)
    with structure.linen_sizes():
        outputs = apply_fn(structure.shrink(corrected, groups, keep), x)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(outputs, expected, atol=2e-6 * scale)
    # Outside of it everything is as before.
    np.testing.assert_array_equal(apply_fn(variables, x).shape, expected.shape)


@pytest.mark.parametrize("kind", ["attention", "convolutions"])
def test_nnx_code_runs_on_smaller_arrays(kind):
    rng = np.random.default_rng(0)
    if kind == "attention":
        net = AttentionNet(nnx.Rngs(0))
        x = jnp.asarray(rng.normal(size=(2, 5, 8)), jnp.float32)
    else:
        net = ConvolutionNet(nnx.Rngs(0))
        x = jnp.asarray(rng.normal(size=(2, 6, 6, 3)), jnp.float32)
    graph, state = nnx.split(net)
    state = drawn(state)

    def apply_fn(state, x):
        return nnx.merge(graph, state)(x)

    groups = structure.groups(apply_fn, state, x)
    keep = random_keep(groups.sizes)
    small = structure.shrink(state, groups, keep)
    expected = structure.resized(apply_fn, groups, keep)(small, x)
    corrected = structure.keep_temperature(state, groups, keep)
    model = nnx.merge(graph, structure.shrink(corrected, groups, keep))
    outputs = structure.nnx_sizes(model)(x)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(outputs, expected, atol=2e-6 * scale)
    layers = [layer for _, layer in nnx.iter_modules(model)]
    for layer in layers:
        if isinstance(layer, nnx.Conv):
            assert layer.out_features == layer.kernel.shape[-1]
        if isinstance(layer, nnx.MultiHeadAttention):
            assert (layer.num_heads, layer.head_dim) == layer.query.out_features


def test_temperature_is_restored_for_code_that_reads_its_sizes():
    case = separate_attention()
    groups = structure.groups(case.function, case.params, *case.args)
    keep = random_keep(groups.sizes)
    expected = structure.resized(case.function, groups, keep)(
        structure.shrink(case.params, groups, keep), *case.args
    )
    corrected = structure.keep_temperature(case.params, groups, keep)
    small = structure.shrink(corrected, groups, keep)
    np.testing.assert_allclose(case.function(small, *case.args), expected, rtol=1e-9)
    uncorrected = structure.shrink(case.params, groups, keep)
    assert not np.allclose(case.function(uncorrected, *case.args), expected, rtol=1e-3)
