# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Optimal Brain Apoptosis: exact scores, and whole units
#
# For a network with weights $\theta$, loss $f$ and Hessian $H$, the score of Optimal
# Brain Apoptosis (Sun et al., ICLR 2025) is $s_i = \theta_i (H\theta)_i$: the share of
# weight i in $\theta^\top H\theta$, its interactions with all others included. What is
# known of it:
#
# 1. **Exactness.** $H\theta$ is one derivative of the gradient along $\theta$
#    (Pearlmutter, 1994), so all scores come from one product, without approximation.
# 2. **Two parts.** $H = J^\top H_{\rm out}J + \sum_c \frac{\partial\ell}{\partial z_c}
#    \nabla^2 z_c$ for outputs $z$: Gauss-Newton, and a functional part. (Chain rule.)
# 3. **Chains.** In a network of L layers without biases whose activations satisfy
#    $\phi(\alpha t) = \alpha\phi(t)$ for $\alpha > 0$, the functional part of the
#    score is $(L-1)\,\theta_i g_i$. *Proof.* The derivative of the outputs with
#    respect to the weights of one layer is homogeneous of degree 1 in each of the other
#    $L-1$ layers, and of degree 0 in its own; by Euler's theorem its derivative along
#    $\theta$ is $(L-1)$ times itself. $\square$
# 4. **Gates.** For whole units a model that is quadratic in one *gate* for each unit,
#    $f(m) \approx f(1) + \langle g, m-1\rangle + \tfrac12 (m-1)^\top G (m-1)$,
#    predicts what a removal does; no theorem says how well, so it is measured.

# %%
import itertools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from scipy.stats import spearmanr
from sklearn.datasets import load_digits

from sparserec import plot, quadratic, saliency, structure

plt.style.use("notebook.mplstyle")


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


# %% [markdown]
# ## Against the whole Hessian
#
# A convolution, a scale and a shift, and a dense layer: 180 weights.
# In double precision the score is that of brute force. A layer-wise approximation
# propagates tangents through the layers, not through the loss and not within a layer:
# it drops the Gauss-Newton part and every block that couples a layer with itself.


# %%
def layers(activation):
    def predict(params, x):
        h = jax.lax.conv_general_dilated(
            x,
            params["conv"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        h = activation(h * params["scale"] + params["shift"])
        return jnp.mean(h, axis=2).reshape(len(x), -1) @ params["head"]

    return predict


def compare(activation, rng):
    """The score and its parts, each from its definition, and the package's score."""
    predict = layers(activation)
    params = {
        "conv": rng.normal(size=(3, 3, 2, 4)) / 3,
        "head": rng.normal(size=(20, 5)) / 2,
        "scale": 1 + rng.normal(size=4) / 4,
        "shift": rng.normal(size=4) / 4,
    }
    params = jax.tree.map(jnp.asarray, params)
    x = jnp.asarray(rng.normal(size=(12, 5, 5, 2)))
    labels = jnp.asarray(rng.integers(0, 5, 12))
    builder = quadratic.gauss_newton(predict, quadratic.softmax_cross_entropy)
    theta, unravel = jax.flatten_util.ravel_pytree(params)

    def f(theta):
        return builder.loss(unravel(theta), x, labels)

    def outputs(theta):
        return predict(unravel(theta), x).ravel()

    def at_outputs(z):
        return quadratic.softmax_cross_entropy(z.reshape(12, 5), labels)

    H, J = np.asarray(jax.hessian(f)(theta)), np.asarray(jax.jacobian(outputs)(theta))
    bend = np.asarray(jax.hessian(at_outputs)(outputs(theta)))
    G = J.T @ bend @ J
    leaf = np.repeat(np.arange(4), [p.size for p in jax.tree.leaves(params)])
    theta = np.asarray(theta)
    between = np.where(leaf[:, None] != leaf[None, :], H - G, 0)
    parts = {
        "exact": theta * (H @ theta),
        "Gauss-Newton": theta * (G @ theta),
        "functional": theta * ((H - G) @ theta),
        "between layers": theta * (between @ theta),
    }
    data = {"args": (x, labels)}
    exact = flat(saliency.oba(builder.loss, params, **data))
    product = flat(saliency.oba(builder.loss, params, curvature="gauss_newton", **data))
    return parts, {"exact": exact, "Gauss-Newton": product}


networks = {"ReLU": jax.nn.relu, "GELU": jax.nn.gelu, "tanh": jnp.tanh}
measured = {}
with jax.enable_x64(True):
    for name, activation in networks.items():
        parts, ours = compare(activation, np.random.default_rng(0))
        measured[name] = parts
        largest = np.abs(parts["exact"]).max()
        for part, scores in ours.items():
            error = np.abs(scores - parts[part]).max() / largest
            assert error <= 1e-12, "exactness: the score is that of the whole Hessian"
        total = parts["Gauss-Newton"] + parts["functional"]
        assert np.abs(total - parts["exact"]).max() <= 1e-10 * largest, (
            "two parts: Gauss-Newton and functional add up to the score"
        )
share = {
    part: [
        np.linalg.norm(measured[name][part]) / np.linalg.norm(measured[name]["exact"])
        for name in networks
    ]
    for part in ("Gauss-Newton", "functional", "between layers")
}
missing = [
    np.linalg.norm(parts["exact"] - parts["between layers"])
    / np.linalg.norm(parts["exact"])
    for parts in measured.values()
]
for part, values in {**share, "left out": missing}.items():
    print(
        f"{part:15}",
        *(f"{n} {v:5.2f}  " for n, v in zip(networks, values, strict=True)),
    )
assert min(missing) >= 0.3, "layer by layer: what is left out is no small correction"

# %% [markdown]
# ## A chain without biases
#
# There the part between layers *is* the first-order score, times $L-1$.


# %%
def chain(params, x):
    for kernel in params[:-1]:
        x = jax.nn.relu(x @ kernel)
    return x @ params[-1]


with jax.enable_x64(True):
    for depth in (2, 3, 5):
        rng = np.random.default_rng(depth)
        widths = [6, *[7] * (depth - 1), 3]
        kernels = [
            jnp.asarray(rng.normal(size=pair) / 2)
            for pair in itertools.pairwise(widths)
        ]
        data = jnp.asarray(rng.normal(size=(9, 6))), jnp.asarray(rng.integers(0, 3, 9))
        builder = quadratic.gauss_newton(chain, quadratic.softmax_cross_entropy)
        exact, by_product = (
            flat(saliency.oba(builder.loss, kernels, args=data, curvature=curvature))
            for curvature in ("hessian", "gauss_newton")
        )
        slope = flat(jax.grad(builder.loss)(kernels, *data))
        first_order = flat(kernels) * slope
        error = np.abs(exact - by_product - (depth - 1) * first_order).max()
        assert error <= 1e-10 * np.abs(exact).max(), (
            "chains: the functional part is L - 1 times the first-order score"
        )
        print(f"{depth} layers: functional part = {depth - 1} x theta g")

# %% [markdown]
# ## Units of a residual network
#
# On scikit-learn's digits: a convolution with stride 2, two residual blocks, a dense
# layer. `structure.groups` finds three groups of 16 units in the trace: the channels of
# the residual stream, and those inside each block.

# %%
images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(labels))
x = jnp.asarray(images.reshape(-1, 8, 8, 1) / 16, jnp.float32)[order]
y = jnp.asarray(labels, jnp.int32)[order]
train, test = (x[500:], y[500:]), (x[:500], y[:500])
WIDTH = 16


def conv(x, kernel, stride=1):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def network(params, x):
    x = jax.nn.relu(conv(x, params["stem"], 2))
    for a, b in (("a1", "b1"), ("a2", "b2")):
        x = jax.nn.relu(x + conv(jax.nn.relu(conv(x, params[a])), params[b]))
    return x.reshape(len(x), -1) @ params["head"]


builder = quadratic.gauss_newton(network, quadratic.softmax_cross_entropy)
loss = jax.jit(builder.loss)
rng = np.random.default_rng(1)
shapes = {"stem": (3, 3, 1, WIDTH), "head": (16 * WIDTH, 10)}
shapes |= {name: (3, 3, WIDTH, WIDTH) for name in ("a1", "b1", "a2", "b2")}
params = {
    name: jnp.asarray(
        rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[:-1])), jnp.float32
    )
    for name, shape in shapes.items()
}
optimizer = optax.adam(2e-3)


@jax.jit
def train_step(params, state, x, y):
    updates, state = optimizer.update(jax.grad(builder.loss)(params, x, y), state)
    return optax.apply_updates(params, updates), state


state = optimizer.init(params)
for _ in range(150):
    batch = rng.integers(0, len(train[1]), 128)
    params, state = train_step(params, state, train[0][batch], train[1][batch])


@jax.jit
def accuracy(params):
    return 100 * jnp.mean(network(params, test[0]).argmax(-1) == test[1])


print(f"dense network: {accuracy(params):.1f} % of the test images")
data = (train[0][:400], train[1][:400])
groups = structure.groups(network, params, data[0])
print("units:", dict(groups.sizes), "unknown primitives:", len(groups.unknown))
assert sorted(groups.sizes.values()) == [WIDTH] * 3, "groups: stream and two blocks"
assert not groups.unknown, "groups: every primitive of the network is known"

# %% [markdown]
# ## What a removal does, predicted and true
#
# Every unit is removed by itself and the loss evaluated. Beside the gate model: the
# score of Optimal Brain Apoptosis, the first-order score and squared weights, each
# summed over the unit.

# %%
names = sorted(groups.sizes)
count = sum(groups.sizes.values())


@jax.jit
def loss_with(gates):
    parts = jnp.split(gates, len(names))
    gated = structure.gate(params, groups, dict(zip(names, parts, strict=True)))
    return builder.loss(gated, *data)


whole = float(loss_with(jnp.ones(count)))
true = np.array(
    [float(loss_with(jnp.ones(count).at[i].set(0))) - whole for i in range(count)]
)
gate_model = structure.gate_model(
    builder.loss, params, groups, args=data, curvature=builder, batch_size=100
)


def summed(scores):
    return np.abs(flat(structure.unit_scores(groups, scores)))


predicted = {
    "gates": flat(structure.gate_scores(gate_model)),
    "OBA": summed(saliency.oba(builder.loss, params, args=data)),
    "Taylor": summed(saliency.taylor(builder.loss, params, args=data)),
    "magnitude": summed(saliency.magnitude(params)),
}
rank = {name: spearmanr(s, true).statistic for name, s in predicted.items()}
for name, value in rank.items():
    print(f"{name:10} rank correlation with the truth: {value:.2f}")
assert rank["gates"] >= 0.9, "gates: rank correlation with the truth above 0.9"
assert rank["gates"] == max(rank.values()), "gates: the best of the four predictions"

# %%
figure, (left, right) = plt.subplots(1, 2, width_ratios=[4, 5])
places = np.arange(len(networks))
for index, (part, values) in enumerate({**share, "left out": missing}.items()):
    left.bar(places + 0.2 * (index - 1.5), values, 0.19, label=part)
left.set_xticks(places, list(networks))
left.set(ylabel="norm, relative to the exact score", title="parts of the OBA score")
left.legend(fontsize="small")
LEAST = 1e-4  # what is below is drawn here
for index, (name, scores) in enumerate(predicted.items()):
    right.loglog(
        np.maximum(scores, LEAST),
        np.maximum(true, LEAST),
        "osD^"[index],
        ms=5,
        zorder=4 - index,
        label=f"{name}, {rank[name]:.2f}",
    )
ends = np.array([LEAST, 10])
right.loglog(ends, ends, "k:", label="as predicted")
right.set(xlabel="predicted rise of the loss", ylabel="true rise of the loss")
right.set(title="one unit removed, rank correlation")
_ = right.legend(fontsize="small")

# %% [markdown]
# ## A residual block cut
#
# Half of the floating point operations go, without any fine-tuning: scores of single
# units, and the joint solve over all gates, which also refits the gates that stay. The
# small network computes what the masked one does.

# %%
budget = structure.total_cost(groups) / 2
kept, losses, hits, small_params = {}, {}, {}, {}
for name, scores in predicted.items():
    parts = dict(zip(names, np.split(scores, len(names)), strict=True))
    kept[name] = structure.select(groups, parts, budget)
    small_params[name] = params
joint = structure.joint(
    builder.loss,
    params,
    groups,
    budget,
    args=data,
    stages=4,
    curvature=builder,
    batch_size=100,
)
kept["joint"] = {name: np.asarray(mask) for name, mask in joint.mask.items()}
small_params["joint"] = structure.gate(params, groups, joint.params)
for name, keep in kept.items():
    mask = structure.mask(params, groups, keep)
    masked = jax.tree.map(lambda m, w: jnp.where(m, w, 0), mask, small_params[name])
    losses[name], hits[name] = float(loss(masked, *data)), float(accuracy(masked))
    widths = ", ".join(f"{int(keep[n].sum()):2}" for n in names)
    assert structure.total_cost(groups, "flops", keep) <= budget, "the budget is kept"
    print(f"{name:10} widths {widths}   loss {losses[name]:5.2f}   {hits[name]:4.1f} %")
others = [value for name, value in losses.items() if name != "joint"]
assert losses["joint"] < min(others), "joint: the lowest loss at half of the operations"

small = structure.shrink(small_params["joint"], groups, kept["joint"])
fast = jax.jit(structure.resized(network, groups, kept["joint"]))
mask = structure.mask(params, groups, kept["joint"])
masked = jax.tree.map(lambda m, w: jnp.where(m, w, 0), mask, small_params["joint"])
outputs = network(masked, test[0])
difference = float(
    jnp.abs(fast(small, test[0]) - outputs).max() / jnp.abs(outputs).max()
)
print({name: leaf.shape for name, leaf in small.items()})
assert difference <= 2e-6, "shrunken: the same outputs as with a mask, to 2e-6"

# %%
figure, (left, right) = plt.subplots(1, 2, width_ratios=[5, 4])
plot.structure(groups, ax=left)
left.set_title("what is cut together")
bars = right.bar(list(hits), list(hits.values()), color=[f"C{i}" for i in range(5)])
right.bar_label(bars, fmt="%.0f", label_type="center")
right.axhline(float(accuracy(params)), color="black", linewidth=0.8, linestyle=":")
right.set(ylabel="test accuracy, %", ylim=(0, 105))
right.tick_params(axis="x", labelrotation=30)
_ = right.set_title("half of the operations, not tuned")
