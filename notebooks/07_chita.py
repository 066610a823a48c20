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
# # CHITA: pruning as sparse regression on gradients
#
# Let $X$ hold m gradients, one row for every mini-batch of $B$ examples, scaled by
# $\sqrt{B/m}$, so that $X^\top X$ is the empirical Fisher matrix, and let
# $g = X^\top h$ be the mean gradient at the trained weights $\bar w$. CHITA (Benbaki et
# al., ICML 2023) prunes the model
#
# $$q(\beta) = \langle g, \beta - \bar w\rangle + \tfrac12\|X(\beta-\bar w)\|^2
#   + \tfrac\rho2\|\beta-\bar w\|^2 \quad\text{such that}\quad \|\beta\|_0 \le k .$$
#
# Four facts, each checked below:
#
# 1. **Reduction.** With $y = X\bar w - h$ this is ridge regression towards $\bar w$
#    with a budget, $q(\beta) = \tfrac12\|y - X\beta\|^2 +
#    \tfrac\rho2\|\beta-\bar w\|^2 - \tfrac12\|h\|^2$: the first-order term is a
#    shift of the response. (Complete the square.)
# 2. **Backsolve.** For $\rho > 0$ the minimiser on a support $Q$ is unique,
#    $\beta_Q = \bar w_Q - X_Q^\top (X_Q X_Q^\top + \rho I)^{-1}(h + X_Q\bar w_Q -
#    X\bar w)$, one system of the size of the *rows*. (The push-through identity.)
# 3. **Descent.** For $L = \sigma_{\max}(X)^2 + \rho$ no step $\beta \leftarrow
#    T_k(\beta - \tau\nabla q)$ with $\tau \le 1/L$ raises $q$. (Blumensath and Davies,
#    2009.)
# 4. **Exchanges.** With $M = (X_QX_Q^\top + \rho I)^{-1}$, $q_j = x_j^\top Mx_j$,
#    $c = x_j^\top M x_i$ and $s$ the gradient at the minimiser on $Q$, taking $i$ out
#    of $Q$, $j$ in, and refitting all others changes the minimum by
#    $\tfrac12\rho\beta_i^2/(1-q_i) - \tfrac12 \bigl(s_j - c\rho\beta_i/(1-q_i)\bigr)^2
#    / \bigl(\rho(1+q_j) + \rho c^2/(1-q_i)\bigr)$.

# %%
import json
import pathlib

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import sparserec as sr

jax.config.update("jax_enable_x64", True)
plt.style.use("notebook.mplstyle")

# %% [markdown]
# ## A network on digits, and its rows
#
# Two layers, 64-16-10, without biases: 1,184 weights.

# %%
images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(labels))
x, y = jnp.asarray(images / 16)[order], jnp.asarray(labels)[order]
train, test = (x[500:], y[500:]), (x[:500], y[:500])


def predict(params, x):
    return jax.nn.relu(x @ params["in"]) @ params["out"]


def loss(params, x, labels):
    return sr.quadratic.softmax_cross_entropy(predict(params, x), labels)


optimizer = optax.adam(1e-2)


@jax.jit
def train_step(params, state, x, labels):
    updates, state = optimizer.update(jax.grad(loss)(params, x, labels), state)
    return optax.apply_updates(params, updates), state


@jax.jit
def accuracy(params):
    return 100 * jnp.mean(predict(params, test[0]).argmax(-1) == test[1])


rng = np.random.default_rng(1)
dense = {
    "in": jnp.asarray(rng.normal(size=(64, 16)) / 8),
    "out": jnp.asarray(rng.normal(size=(16, 10)) / 5),
}
state = optimizer.init(dense)
for _ in range(300):
    batch = rng.integers(0, len(train[1]), 128)
    dense, state = train_step(dense, state, train[0][batch], train[1][batch])
print(f"dense network: {accuracy(dense):.1f} % of the test images")

B, ROWS, RIDGE = 6, 200, 1e-3
fisher = sr.quadratic.fisher(rows=ROWS, batch_size=B)
data = (train[0][: B * ROWS], train[1][: B * ROWS])
model = fisher(loss, dense, data)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def gradient_rows(params, x, labels):
    """Row i: the mean gradient of the examples i, i + ROWS, i + 2 ROWS, ..."""
    x, labels = x.reshape(B, ROWS, -1).swapaxes(0, 1), labels.reshape(B, ROWS).T
    rows = jax.lax.map(lambda batch: jax.grad(loss)(params, *batch), (x, labels))
    return np.concatenate([np.reshape(r, (ROWS, -1)) for r in jax.tree.leaves(rows)], 1)


X = gradient_rows(dense, *data) * np.sqrt(B / ROWS)
w = flat(dense)
h = np.full(ROWS, 1 / np.sqrt(B * ROWS))  # g is the mean of the unscaled rows
response = X @ w - h


def q(beta, ridge=RIDGE):
    misfit = response - X @ beta
    return (misfit @ misfit + ridge * np.sum((beta - w) ** 2) - h @ h) / 2


def split(vector):
    sizes = [leaf.size for leaf in jax.tree.leaves(dense)]
    parts = np.split(vector, np.cumsum(sizes)[:-1])
    leaves = [
        jnp.asarray(part.reshape(leaf.shape))
        for part, leaf in zip(parts, jax.tree.leaves(dense), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(dense), leaves)


print(f"{X.shape[0]} rows, {X.shape[1]} weights")
for scale in (0.01, 0.1, 1.0):
    beta = w + scale * rng.normal(size=w.size)
    by_package = float(model(split(beta)) - model(dense))
    assert abs(by_package - q(beta, 0.0)) <= 1e-10 * abs(by_package), (
        "reduction: the model is a regression on rows of gradients"
    )
    without = by_package - np.sum((X @ (beta - w)) ** 2) / 2
    assert np.isclose(without, h @ X @ (beta - w), rtol=1e-8), (
        "reduction: the shift of the response is the first-order term"
    )

# %% [markdown]
# ## Backsolve, and single precision
#
# The usual form of Woodbury's identity, $b/\rho - X_Q^\top(\cdot)X_Q b/\rho^2$, is a
# difference of large numbers when $\rho$ is small. The push-through form is not. Below,
# both in float32, against the optimum in float64 on the same support; the last curve is
# `sr.chita_path` itself, run in float32.


# %%
def optimum(Q, ridge):
    """The minimiser on a support in float64, from normal equations."""
    beta = np.zeros_like(w)
    gram = X[:, Q].T @ X[:, Q] + ridge * np.eye(Q.sum())
    right = response @ X[:, Q] + ridge * w[Q]
    beta[Q] = np.linalg.solve(gram, right)
    return beta


def push_through(X, w, h, Q, ridge):
    rows = X[:, Q]
    kernel = rows @ rows.T + ridge * np.eye(len(rows), dtype=X.dtype)
    inner = np.linalg.solve(kernel, h + rows @ w[Q] - X @ w)
    return np.where(Q, w, 0) - np.bincount(
        np.flatnonzero(Q), inner @ rows, minlength=w.size
    ).astype(X.dtype)


def woodbury(X, w, h, Q, ridge):
    rows, ridge = X[:, Q], X.dtype.type(ridge)
    right = (X @ w - h) @ rows + ridge * w[Q]
    kernel = np.eye(len(rows), dtype=X.dtype) + rows @ rows.T / ridge
    inner = np.linalg.solve(kernel, rows @ right)
    beta = np.zeros_like(w)
    beta[Q] = right / ridge - inner @ rows / ridge**2
    return beta


K = sr.keep(dense, density=0.2)
single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (dense, data[0]))
ridges = np.geomspace(1e-7, 1e-1, 7)
# One budget, all ridges: they share the kernel.
path = sr.chita_path(
    fisher(loss, single[0], (single[1], data[1])), single[0], [K], ridges
)
Q = flat(jax.tree.map(lambda m: m[0, 0], path.mask))
by_package = [
    np.concatenate([np.ravel(leaf[0, i]) for leaf in jax.tree.leaves(path.params)])
    for i in range(len(ridges))
]
excess = {"Woodbury": [], "push-through": [], "sr.chita_path": []}
for index, ridge in enumerate(ridges):
    best = optimum(Q, ridge)
    exact = push_through(X, w, h, Q, ridge)
    assert np.isclose(q(exact, ridge), q(best, ridge), rtol=1e-8), (
        "backsolve: the push-through form is the minimiser on the support"
    )
    narrow = [a.astype(np.float32) for a in (X, w, h)]
    candidates = {
        "Woodbury": woodbury(*narrow, Q, ridge),
        "push-through": push_through(*narrow, Q, np.float32(ridge)),
        "sr.chita_path": by_package[index],
    }
    for name, beta in candidates.items():
        gap = q(beta.astype(float), ridge) - q(best, ridge)
        excess[name].append(max(gap, 1e-16) / abs(q(best, ridge)))
for name, values in excess.items():
    print(f"{name:13} largest excess below 1e-5: {max(values) <= 1e-5}")
assert max(excess["sr.chita_path"]) <= 1e-5, (
    "backsolve: float32 is within 1e-5 everywhere"
)
assert max(excess["Woodbury"]) >= 1e-3, "backsolve: the usual form loses its digits"

# %% [markdown]
# ## Thresholded steps, and the exact change of an exchange

# %%
largest = np.linalg.norm(X, 2) ** 2 + RIDGE
beta, values = w.copy(), []
for _ in range(100):
    slope = (X @ beta - response) @ X + RIDGE * (beta - w)
    beta = beta - slope / largest
    beta[np.argsort(-np.abs(beta), kind="stable")[K:]] = 0
    values.append(q(beta))
assert np.all(np.diff(values) <= 1e-12), "descent: steps of 1/L never raise the model"

Q = beta != 0
best = optimum(Q, RIDGE)
M = np.linalg.inv(X[:, Q] @ X[:, Q].T + RIDGE * np.eye(ROWS))
slope = (X @ best - response) @ X + RIDGE * (best - w)
errors = []
for _ in range(40):
    i, j = rng.choice(np.flatnonzero(Q)), rng.choice(np.flatnonzero(~Q))
    qi, qj, c = X[:, i] @ M @ X[:, i], X[:, j] @ M @ X[:, j], X[:, j] @ M @ X[:, i]
    removal = RIDGE * best[i] / (1 - qi)
    bend = RIDGE * (1 + qj) + RIDGE * c**2 / (1 - qi)
    predicted = (best[i] * removal - (slope[j] - c * removal) ** 2 / bend) / 2
    other = Q.copy()
    other[[i, j]] = False, True
    actual = q(optimum(other, RIDGE)) - q(best)
    errors.append(abs(predicted - actual) / abs(actual))
print(
    f"40 exchanges, largest relative error of the formula below 1e-6: "
    f"{max(errors) <= 1e-6}"
)
assert max(errors) <= 1e-6, "exchanges: the formula is the change after a full refit"

# %% [markdown]
# ## Who finds the lowest value
#
# The same model for all. IHT moves the support; coordinate descent and backsolve keep
# the one of a thresholded step; `"best"` lets both supports compete and polishes the
# better by exchanges. Magnitude pruning leaves values as they are. For the smallest
# budget `sr.l0cd` continues with exact exchanges, one at a time, until there is none.

# %%
ridged = sr.quadratic.fisher(rows=ROWS, batch_size=B, ridge=RIDGE)(loss, dense, data)
densities = [0.5, 0.2, 0.1, 0.05, 0.03]
variants = ["iht", "cd", "bso", "best"]
solved = {
    (name, density): sr.chita(
        ridged,
        dense,
        sr.keep(dense, density=density),
        variant=name,
        exchanges=5,
        tol=1e-6,
        max_steps=50,
    )
    for name in variants
    for density in densities
}


def masked(density):
    """Magnitude pruning: values as they are."""
    return np.where(flat(sr.select.top_k(dense, sr.keep(dense, density=density))), w, 0)


change = {"magnitude": np.array([q(masked(d)) for d in densities])}
for name in variants:
    change[name] = np.array([q(flat(solved[name, d].params)) for d in densities])
print(f"{'density':10}", *(f"{d:8.0%}" for d in densities))
for name, values in change.items():
    print(f"{name:10}", *(f"{value:8.4f}" for value in values))
for name in ("magnitude", "iht", "cd", "bso"):
    assert np.all(change["best"] <= change[name] + 1e-12), (
        "exchanges: competing supports and exchanges are lowest at every density"
    )
assert np.all(change["bso"] <= change["cd"] + 1e-12), "backsolve: not above descent"
assert np.all(change["cd"] < change["magnitude"]), "descent: far below masking alone"

few = sr.keep(dense, density=densities[-1])
polished = solved["best", densities[-1]]
swapped = sr.l0cd(ridged, polished.params, few, effort=0.0)
after = sr.certificate(ridged, swapped)
print(
    f"{few} weights, exact exchanges: {change['best'][-1]:.5f} -> "
    f"{q(flat(swapped.params)):.5f}"
)
assert q(flat(swapped.params)) <= change["best"][-1] + 1e-12, (
    "exact exchanges: never above where they started"
)
assert float(after.relative) <= 1e-9, "exact exchanges: at the end there is none left"

# %%
figure, (left_ax, right_ax) = plt.subplots(1, 2, width_ratios=[4, 5])
for name, values in excess.items():
    left_ax.loglog(ridges, values, "o-", label=name)
left_ax.set(xlabel=r"ridge $\rho$", ylabel="relative excess of $q$ in float32")
left_ax.set_title("backsolve in single precision")
left_ax.legend(fontsize="small", loc="center right")
places = np.arange(len(densities))
for index, name in enumerate(variants):
    gain = (change["magnitude"] - change[name]) / change["magnitude"]
    right_ax.bar(places + 0.2 * (index - 1.5), 100 * (1 - gain), 0.19, label=name)
right_ax.set_xticks(places, [f"{d:.0%}" for d in densities])
right_ax.set(xlabel="density", ylabel="$q$, % of magnitude pruning")
right_ax.set_title("one model, four variants")
_ = right_ax.legend(fontsize="small")

# %% [markdown]
# ## One stage against many
#
# A lower model value is not a higher accuracy: far from $\bar w$ the model is no longer
# the loss. CHITA++ prunes in stages, each with fresh rows at the weights of the stage
# before.

# %%
STAGES = 12


def fresh(stage):
    chosen = np.random.default_rng(stage).choice(len(train[1]), B * ROWS, replace=False)
    return train[0][chosen], train[1][chosen]


many = sr.quadratic.fisher(rows=ROWS, batch_size=B, ridge=1e-2)
by_stages = {"magnitude": [], "one stage": [], f"{STAGES} stages": []}
for density in densities:
    k = sr.keep(dense, density=density)
    staged = sr.chita(
        loss,
        dense,
        k,
        batches=fresh,
        curvature=many,
        variant="bso",
        stages=STAGES,
        schedule="geometric",
    )
    assert sum(int(m.sum()) for m in jax.tree.leaves(staged.mask)) == k, (
        "stages: exactly k weights are kept"
    )
    answers = split(masked(density)), solved["best", density].params, staged.params
    for name, params in zip(by_stages, answers, strict=True):
        by_stages[name].append((density, float(accuracy(params))))
print(f"{'density':10}", *(f"{d:6.0%}" for d in densities))
for name, points in by_stages.items():
    print(f"{name:10}", *(f"{value:6.1f}" for _, value in points))
at = {name: np.array(points)[:, 1] for name, points in by_stages.items()}
assert np.all(at[f"{STAGES} stages"][2:] >= at["one stage"][2:]), (
    "stages: not below one stage at density 10 % and less"
)
assert at[f"{STAGES} stages"][-1] >= at["one stage"][-1] + 10, (
    "stages: 10 points above one stage at density 3 %"
)

# %%
figure, ax = plt.subplots(figsize=(7, 4))
sr.plot.tradeoff(
    by_stages, dense=float(accuracy(dense)), label="test accuracy, %", ax=ax
)
_ = ax.set_title("1,184 weights on digits")

# %% [markdown]
# ## MLPNet on MNIST
#
# The network of the paper, 32,360 weights, 93.97 % before pruning. It takes minutes, so
# the figures are those that `benchmarks.mlpnet` has stored, with the command that
# measures them again: test accuracy in percent, mean of three seeds.


# %%
def stored(*names):
    """Mean accuracy at each density, and how it was measured."""
    found, commands = {}, []
    for name in names:
        report = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        column = report["columns"].index("mean accuracy")
        found |= {row[0]: row[column] for row in report["rows"]}
        commands.append(report["command"])
    return found, commands


RESULTS = pathlib.Path("../benchmarks/results")
staged_files = [f"mlpnet_chita_stages{part}" for part in ("_50", "_20", "")]
runs = {
    "one stage, IHT": ["mlpnet_chita_iht"],
    "... refined": ["mlpnet_chita_iht_refined"],
    "15 stages": staged_files,
}
table = {name: stored(*files) for name, files in runs.items()}
columns = ["50 %", "20 %", "10 %", "5 %", "2 %"]
print(f"{'':15}", *(f"{c:>6}" for c in columns))
for name, (row, _) in table.items():
    print(f"{name:15}", *(f"{row[c]:6.2f}" for c in columns))
for name, (_, commands) in table.items():
    print(f"\n{name}:", *commands, sep="\n  ")
first, refined, staged = (row for row, _ in table.values())
assert all(refined[c] >= first[c] for c in columns), (
    "MLPNet: refinements help everywhere"
)
assert all(staged[c] >= refined[c] + 1 for c in columns), (
    "MLPNet: 15 stages are a point above one stage at every density"
)
