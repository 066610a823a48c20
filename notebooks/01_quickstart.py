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
# # Quickstart
#
# `sparserec` chooses $k$ weights of a model, and their values:
#
# $$\min_\theta f(\theta) \quad\text{such that at most $k$ weights are nonzero.}$$
#
# A vector of coefficients, a Flax linen network and an nnx network go through the same
# call: `solver(loss, params, k, args=data)` returns a `Solution`.

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import sparserec as sr

plt.style.use("notebook.mplstyle")

# %% [markdown]
# ## A vector
#
# 60 examples of 200 features, 8 of which have an effect; neighboring features are
# correlated by 0.9. For such a design any 16 columns are linearly independent, so the 8
# coefficients are the only 8-sparse ones that fit the data exactly (Donoho and Elad,
# 2003): a loss of zero proves that they were found. The theory of the solvers needs
# double precision to show itself, so it is switched on for this part.

# %%
with jax.enable_x64(True):
    problem = sr.problems.correlated_design(
        jax.random.key(0), 60, 200, 8, correlation=0.9
    )
    model = sr.quadratic.least_squares(problem.design, problem.response)
    start = jnp.zeros(200)
    solution = sr.check(sr.iobs(model, start, k=8))  # raises if it did not converge
    by_gradients = sr.iht(model, start, k=8)
    truth = np.asarray(problem.coefficients)
    print(sr.report(start, solution))

found, other = np.asarray(solution.params), np.asarray(by_gradients.params)
print("steps:", int(solution.iterations))
print("error of I-OBS below 1e-8:", bool(np.abs(found - truth).max() < 1e-8))
print(f"IHT finds {np.sum((other != 0) & (truth != 0))} of the 8 features")
assert np.count_nonzero(found) == 8, "a vector: exactly k weights are kept"
assert np.abs(found - truth).max() < 1e-8, "a vector: I-OBS finds the 8 coefficients"

# %%
figure, (left, right) = plt.subplots(1, 2, width_ratios=[3, 2])
live = np.flatnonzero(truth)
left.vlines(live, 0, truth[live], color="#bbbbbb", linewidth=4, label="the answer")
left.plot(np.flatnonzero(found), found[found != 0], "o", color="C0", label="I-OBS")
left.plot(np.flatnonzero(other), other[other != 0], "x", color="C1", label="IHT")
left.axhline(0, color="black", linewidth=0.8)
left.set(xlabel="feature", ylabel="coefficient", title="8 of 200 coefficients")
left.legend(fontsize="small")
sr.plot.convergence({"I-OBS": solution, "IHT": by_gradients}, ax=right)
right.set_title("loss")
right.set_xscale("log")

# %% [markdown]
# ## A linen network
#
# A small convolutional network on scikit-learn's 8 x 8 digits: 1,297 images to train
# and prune, 500 to test.

# %%
images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(labels))
x = jnp.asarray(images.reshape(-1, 8, 8, 1) / 16, jnp.float32)[order]
y = jnp.asarray(labels, jnp.int32)[order]
train, test = (x[500:], y[500:]), (x[:500], y[:500])

net = nn.Sequential(
    [
        nn.Conv(8, (3, 3), strides=2),
        nn.relu,
        nn.Conv(16, (3, 3)),
        nn.relu,
        lambda x: x.reshape(x.shape[0], -1),
        nn.Dense(32),
        nn.relu,
        nn.Dense(10),
    ]
)
params = jax.jit(net.init)(jax.random.key(0), x[:1])["params"]


def predict(params, x):
    return net.apply({"params": params}, x)


curvature = sr.quadratic.gauss_newton(
    predict, sr.quadratic.softmax_cross_entropy, cg_steps=4
)
everything = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), params)
optimizer = optax.chain(optax.adam(3e-3), sr.training.keep_mask(everything))


@jax.jit
def train_step(params, state, batch):
    gradient = jax.grad(curvature.loss)(params, train[0][batch], train[1][batch])
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state


def fit(params, mask=everything, steps=250):
    """Adam under a mask, which is part of the optimizer's state."""
    state = optax.tree.set(optimizer.init(params), mask=mask)
    batches = np.random.default_rng(1).integers(0, len(train[1]), (steps, 128))
    for batch in batches:
        params, state = train_step(params, state, batch)
    return params


@jax.jit
def hits(params):
    return jnp.mean(predict(params, test[0]).argmax(-1) == test[1])


def accuracy(params):
    return 100 * float(hits(params))


dense = fit(params)
print(f"dense network: {accuracy(dense):.1f} % of the test images")

# %% [markdown]
# Pruning is one call. `sr.keep` turns a density into a count; biases stay. I-OBS goes
# down from all weights in eight stages and models the loss anew in each. With
# convolutions on CPU, `batch_size=` keeps its loops outside of compiled code. Magnitude
# pruning, which sees neither loss nor data, is there for comparison. All are then
# fine-tuned for 60 steps under their mask.

# %%
common = {"args": train, "curvature": curvature, "batch_size": len(train[1])}


def by_magnitude(k):
    budget = sr.make_budget(k, dense)
    mask = sr.select.support(dense, budget.counts, budget.groups)
    return sr.apply_mask(dense, mask), mask


def by_iobs(k):
    solution = sr.iobs(
        curvature.loss,
        dense,
        k,
        schedule="down",
        stages=8,
        max_steps=8,
        refinements=1,
        **common,
    )
    return solution.params, solution.mask


densities = [0.2, 0.1, 0.05, 0.03]
loss = jax.jit(curvature.loss)
pruned, tuned, losses = {}, {}, {}
for name, prune in {"magnitude": by_magnitude, "I-OBS": by_iobs}.items():
    pruned[name], tuned[name], losses[name] = [], [], []
    for density in densities:
        k = sr.keep(dense, density=density)
        params, mask = prune(k)
        kernels = [m for m in jax.tree.leaves(mask) if m.ndim > 1]
        assert sum(int(m.sum()) for m in kernels) == k, "networks: exactly k are kept"
        losses[name].append(float(loss(params, *train)))
        pruned[name].append((density, accuracy(params)))
        after = fit(params, mask, steps=60)
        zero = jax.tree.map(lambda w, m: jnp.all(w[~m] == 0), after, mask)
        assert all(map(bool, jax.tree.leaves(zero))), "fine-tuning: pruned stay zero"
        tuned[name].append((density, accuracy(after)))
    print(f"{name:9}", *(f"{d:.0%}: {a:.1f} %  " for d, a in pruned[name]))
gains = [a[1] - b[1] for a, b in zip(pruned["I-OBS"], pruned["magnitude"], strict=True)]
assert np.all(np.array(losses["I-OBS"]) < losses["magnitude"]), "I-OBS: the lower loss"
assert min(gains[1:]) >= 10, "I-OBS: 10 points above magnitude at density 10 % and less"

# %%
figure, ax = plt.subplots(figsize=(7, 4))
sr.plot.tradeoff(
    pruned, after=tuned, dense=accuracy(dense), label="test accuracy, %", ax=ax
)
_ = ax.set_title("A convolutional network on digits")

# %% [markdown]
# ## An nnx network
#
# Split the module, prune its `State`, put the result back. IHT, in the same call.

# %%
rngs = nnx.Rngs(0)
module = nnx.Sequential(
    lambda x: x.reshape(x.shape[0], -1),
    nnx.Linear(64, 32, rngs=rngs),
    nnx.relu,
    nnx.Linear(32, 10, rngs=rngs),
)
graphdef, weights, rest = nnx.split(module, nnx.Param, ...)


def predict_nnx(weights, x):
    return nnx.merge(graphdef, weights, rest)(x)


bend = sr.quadratic.gauss_newton(predict_nnx, sr.quadratic.softmax_cross_entropy)
k = sr.keep(weights, density=0.1)
solution = sr.iht(bend.loss, weights, k, args=train, curvature=bend, max_steps=200)
nnx.update(module, solution.params)
share = 100 * float(jnp.mean(module(test[0]).argmax(-1) == test[1]))
print(sr.report(weights, solution))
print(f"{share:.1f} % of the test images, from random weights, with {k} of them kept")
history = np.asarray(solution.history.objective)[: int(solution.iterations)]
assert np.all(np.diff(history) <= 1e-6 * history[0]), "IHT: the loss never rises"
assert share >= 60, "nnx: more than 60 % right with a tenth of the weights"

# %%
figure, (left, right) = plt.subplots(1, 2)
sr.plot.convergence(solution, ax=left)
sr.plot.mask(solution, sr.report(weights, solution).rows[1].path, ax=right)
right.grid(visible=False)

# %% [markdown]
# From here: which solver for which problem is answered in *Choosing a solver*; what
# happens inside one step, in *I-OBS*; and whether the theorems hold, in the notebooks
# that follow.
