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
# # The OBS update: five forms, its special cases, its projector
#
# Around $\theta$ a loss is $q(x) = \langle g, x - \theta\rangle + \tfrac12
# (x-\theta)^\top H (x-\theta)$ up to a constant, with $H \succ 0$. With the Newton
# point $u = \theta - H^{-1}g$ this is $\tfrac12 (x-u)^\top H (x-u)$, again up to a
# constant. Choose a set $Q$ of weights to keep, $S$ the others. The best $x$ with
# $x_S = 0$ is the **Optimal Brain Surgeon update**, and there are five ways to write it
# ($b = H\theta - g = Hu$):
#
# - **constraint**: $x = u - H^{-1}_{\cdot S}\,([H^{-1}]_{SS})^{-1}\, u_S$
# - **support**: $x_Q = u_Q + H_{QQ}^{-1} H_{QS}\, u_S$
# - **gradient**: $x_Q = H_{QQ}^{-1}\, b_Q$
# - **restricted Newton**: $x_Q = \theta_Q - H_{QQ}^{-1} g_Q$, if $\theta_S = 0$
# - **sequential**: for $p \in S$ in any order, $u \leftarrow u - K e_p\, u_p/K_{pp}$,
#   $K \leftarrow K - K e_p e_p^\top K / K_{pp}$, starting with $K = H^{-1}$
#
# *Proof.* Stationarity on $Q$, $H_{QQ}(x_Q - u_Q) = H_{QS} u_S$, is the support form.
# $(Hu)_Q = H_{QQ}u_Q + H_{QS}u_S = b_Q$ turns it into the gradient form, and that into
# the restricted Newton step where $H\theta = H_{\cdot Q}\theta_Q$. The block inverse
# $[H^{-1}]_{QS} = -H_{QQ}^{-1}H_{QS}[H^{-1}]_{SS}$ gives the constraint form. One
# removal is the constraint form for one weight, and leaves in $K$ the inverse of $H$
# without its row and column. $\square$
#
# Sources: Hassibi and Stork (1993) for the constraint form; Frantar and Alistarh (OBC,
# 2022) for the sequential one; Wu et al. (I-OBS, NeurIPS 2024).

# %%
import itertools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import sparserec as sr
from sparserec import theory

jax.config.update("jax_enable_x64", True)
plt.style.use("notebook.mplstyle")


def random_hessian(rng, dim, condition):
    """A random rotation of the geometric spectrum from 1 to the condition number."""
    basis, _ = np.linalg.qr(rng.normal(size=(dim, dim)))
    return (basis * np.geomspace(1, condition, dim)) @ basis.T


# %% [markdown]
# ## All forms agree, and the package computes them
#
# The five forms in NumPy, as above; the package's refit is the gradient form,
# `curvature.solve_on(mask, b, damping)`.


# %%
def constraint(H, u, Q):
    K = np.linalg.inv(H)
    x = u - K[:, ~Q] @ np.linalg.solve(K[np.ix_(~Q, ~Q)], u[~Q])
    return np.where(Q, x, 0)


def on_support(H, Q, right):
    x = np.zeros(len(H))
    x[Q] = np.linalg.solve(H[np.ix_(Q, Q)], right[Q])
    return x


def support(H, u, Q):
    return np.where(Q, u, 0) + on_support(H, Q, H @ np.where(Q, 0, u))


def sequential(H, u, order):
    K, x = np.linalg.inv(H), u.copy()
    for p in order:
        column = K[:, p] / K[p, p]
        x = x - column * x[p]
        K = K - np.outer(column, K[p])
        x[p] = K[p] = K[:, p] = 0  # exact; rounding here would be divided by pivots
    return x


rng = np.random.default_rng(0)
solve_on = jax.jit(lambda H, Q, b: sr.quadratic.Dense(H).solve_on(Q, b, 0.0).value)
differences = []
for condition, kept in itertools.product([1e1, 1e4], range(2, 30, 3)):
    H = random_hessian(rng, 30, condition)
    theta, g = rng.normal(size=(2, 30))
    Q = rng.permutation(30) < kept
    sparse = np.where(Q, theta, 0)
    u, u_sparse = theta - np.linalg.solve(H, g), sparse - np.linalg.solve(H, g)
    reference = constraint(H, u, Q)
    others = {
        "support": support(H, u, Q),
        "gradient": on_support(H, Q, H @ theta - g),
        "sequential": sequential(H, u, rng.permutation(np.flatnonzero(~Q))),
        "the package": np.asarray(solve_on(H, Q, H @ theta - g)),
    }
    size = max(np.linalg.norm(reference), np.linalg.norm(u))
    row = {k: np.linalg.norm(x - reference) / size for k, x in others.items()}
    # From a point on the support there is one form more.
    newton = sparse - on_support(H, Q, g)
    difference = np.linalg.norm(newton - constraint(H, u_sparse, Q))
    row["restricted Newton"] = difference / np.linalg.norm(u_sparse)
    differences.append(row)
for name in row:
    largest = max(row[name] for row in differences)
    print(
        f"{name:17} differs from the constraint form by less than 1e-10:",
        largest < 1e-10,
    )
    assert largest < 1e-10, "the five forms of the update, and the package's, agree"

# %% [markdown]
# ## The price of a set, and the best set
#
# The loss of the model after the update has two forms too:
#
# $$\min_{x_S = 0} \tfrac12 (x-u)^\top H (x-u)
# = \tfrac12\, u_S^\top ([H^{-1}]_{SS})^{-1} u_S
# = \tfrac12\, u^\top H u - \tfrac12\, b_Q^\top H_{QQ}^{-1} b_Q .$$
#
# So the ideal support is the one with the largest $b_Q^\top H_{QQ}^{-1} b_Q$: the exact
# projection of $u$ onto the $k$-sparse vectors in the norm of $H$. Trying all supports
# finds it, in NumPy as in `mask_rule="exact"`.


# %%
def best_price(H, u, k):
    """The least loss over all supports of k weights, by trying them all."""
    b = H @ u
    kept = np.array(list(itertools.combinations(range(len(u)), k)))
    blocks = H[kept[:, :, None], kept[:, None, :]]
    explained = np.einsum(
        "si,si->s", b[kept], np.linalg.solve(blocks, b[kept][..., None])[..., 0]
    )
    return (u @ H @ u - explained.max()) / 2


H, u = random_hessian(rng, 10, 100.0), rng.normal(size=10)
model = sr.quadratic.dense(jnp.asarray(H), jnp.asarray(u))
bare = {"damping": 0.0, "safeguard": False, "max_steps": 1}
exact = sr.iobs(model, jnp.zeros(10), 4, mask_rule="exact", **bare)
x, Q = np.asarray(exact.params), np.asarray(exact.mask)
K = np.linalg.inv(H)
prices = [
    (x - u) @ H @ (x - u) / 2,
    u[~Q] @ np.linalg.solve(K[np.ix_(~Q, ~Q)], u[~Q]) / 2,
    (u @ H @ u - (H @ u)[Q] @ np.linalg.solve(H[np.ix_(Q, Q)], (H @ u)[Q])) / 2,
    best_price(H, u, 4),
]
print("price of the best set, four ways:", *(f"{price:.6f}" for price in prices))
assert np.ptp(prices) <= 1e-10 * prices[0], (
    "the price of a set: both forms, exact search"
)

# %% [markdown]
# ## An oblique projector (Lemma 7, corrected)
#
# The update is $x = (I - P)u$ with $P = H^{-1} I_S^\top ([H^{-1}]_{SS})^{-1} I_S$ and
# $P^2 = P$. The paper's Lemma 7 concludes $\|P\|_2 \le 1$. But $P$ is orthogonal in the
# inner product of $H$, not in the Euclidean one:
#
# $$\|P\|_2 \le \frac{\kappa + 1}{2\sqrt\kappa}, \quad\text{attained}; \qquad
# \|P H^{-1}\|_2 \le \frac1\mu, $$
#
# and the second is what the proof of Theorem 1 needs
# (`theory.oblique_projection_bound`). The smallest counterexample has two weights.


# %%
def projector(H, S):
    K = np.linalg.inv(H)
    return K[:, S] @ np.linalg.solve(K[np.ix_(S, S)], np.eye(len(H))[S])


H = np.array([[1.0, 0.9], [0.9, 1.0]])
P = projector(H, np.array([True, False]))
bound = float(theory.oblique_projection_bound(19.0))
print(f"H = [[1, .9], [.9, 1]]: |P| = {np.linalg.norm(P, 2):.3f}, bound {bound:.3f}")
assert np.linalg.norm(P, 2) > 1.3, "Lemma 7 as printed fails on two weights"

kappas, norms, needed = np.geomspace(1, 1e4, 9), [], []
for kappa in kappas:
    bound = float(theory.oblique_projection_bound(kappa))
    found = []
    for trial in range(60):
        # A hard instance: the kept weight lies between the extreme eigenvectors.
        angle = np.arctan(kappa**-0.5) if trial == 0 else None
        if angle is None:
            H = random_hessian(rng, 6, kappa)
            S = rng.permutation(6) < rng.integers(1, 6)
        else:
            turn = np.array(
                [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
            )
            H, S = turn @ np.diag([kappa, 1.0]) @ turn.T, np.array([True, False])
        P = projector(H, S)
        found.append(np.linalg.norm(P, 2))
        needed.append(
            np.linalg.norm(P @ np.linalg.inv(H), 2) * np.linalg.eigvalsh(H)[0]
        )
    assert max(found) <= bound * (1 + 1e-9), "the norm of the update: corrected bound"
    assert max(found) >= 0.999 * bound, "the norm of the update: bound attained"
    norms.append((bound, found[0], max(found[1:])))
print(f"mu |P H^-1| at most {max(needed):.4f}")
assert 0.99 <= max(needed) <= 1 + 1e-9, "what Theorem 1 needs, |P H^-1| <= 1/mu, holds"

# %%
figure, ax = plt.subplots(figsize=(5.5, 3.4))
norms = np.array(norms)
ax.loglog(kappas, norms[:, 0], "k", label=r"$(\kappa+1)/(2\sqrt{\kappa})$")
ax.loglog(kappas, norms[:, 1], "D", label="hard instance")
ax.loglog(kappas, norms[:, 2], "o", label="largest of 59 random")
ax.axhline(1, color="C1", linestyle=":", label="Lemma 7 as printed")
ax.set(
    xlabel=r"condition number $\kappa$", ylabel=r"$\|P\|_2$", title="Norm of the update"
)
_ = ax.legend(fontsize="small")

# %% [markdown]
# ## OBD, OBS and OBC are one step of I-OBS
#
# - **OBD** (LeCun, Denker and Solla, 1990): diagonal $H$. The price of $p$ is
#   $\tfrac12 H_{pp}u_p^2$, and the others do not move.
# - **OBS** (Hassibi and Stork, 1993): $k = d - 1$. The price of $p$ is
#   $u_p^2/(2[H^{-1}]_{pp})$.
# - **OBC** (Frantar and Alistarh, 2022): one after another, always the cheapest, with
#   the inverse updated: `sr.obs`, and `mask_rule="backward"`.

# %%
H, u = random_hessian(rng, 12, 100.0), rng.normal(size=12)
model = sr.quadratic.dense(jnp.asarray(H), jnp.asarray(u))
start = jnp.asarray(u)
K = np.linalg.inv(H)

diagonal = sr.quadratic.diagonal(jnp.asarray(np.diag(H)), jnp.asarray(u))
saliency = np.diag(H) * u**2 / 2
kept = saliency >= np.sort(saliency)[-5]
damage = sr.obd(diagonal, start, 5)
projected = sr.iobs(diagonal, start, 5, mask_rule="saliency", **bare)
assert np.array_equal(damage.mask, kept), "OBD keeps the largest H_ii u_i^2 / 2"
assert np.allclose(damage.params, projected.params), "OBD is I-OBS with a diagonal H"

p = np.argmin(u**2 / np.diag(K))
surgeon = sr.obs(model, start, 11)
projected = sr.iobs(model, start, 11, mask_rule="saliency", **bare)
by_hand = u - u[p] * K[:, p] / K[p, p]
assert not surgeon.mask[p], "OBS removes the weight of least u_p^2 / [H^-1]_pp"
assert np.allclose(surgeon.params, by_hand, atol=1e-12), "OBS is the formula of 1993"
assert np.allclose(projected.params, by_hand, atol=1e-12), "OBS is I-OBS with k = d - 1"
assert np.isclose(surgeon.objective, u[p] ** 2 / K[p, p] / 2), "OBS: price as predicted"

compressed = sr.obs(model, start, 4)
projected = sr.iobs(model, start, 4, mask_rule="backward", **bare)
assert np.allclose(compressed.params, projected.params), "OBC is I-OBS, rule 'backward'"
print("OBD, OBS and OBC agree with one step of I-OBS")

# %% [markdown]
# ## How near cheap supports come to the exact projection
#
# $d = 16$, $k = 5$, a dense $u$, 40 draws from each of three families of $H$: entries
# $0.9^{|i-j|}$ with random signs, condition number 1,000, and Wishart with 24 degrees
# of freedom. Prices are divided by that of the best of all 4,368 supports.

# %%
DIM, K_KEPT, DRAWS = 16, 5, 40


def autoregressive(rng):
    signs = rng.choice([-1.0, 1.0], DIM)
    distance = np.abs(np.subtract.outer(np.arange(DIM), np.arange(DIM)))
    return 0.9**distance * np.outer(signs, signs)


def wishart(rng):
    rows = rng.normal(size=(24, DIM))
    return rows.T @ rows / 24


families = {
    "correlation 0.9": autoregressive,
    "condition 1,000": lambda rng: random_hessian(rng, DIM, 1e3),
    "Wishart": wishart,
}
rules = {
    "top-k, values untouched": {"values": "top_k", **bare},
    "top-k + OBS": bare,
    "saliency + OBS": {"mask_rule": "saliency", **bare},
    "backward (OBC) + OBS": {"mask_rule": "backward", **bare},
    "the default, + exchanges": {},
}


def price_of(rule):
    """Price of the support that a rule finds, for many quadratics at once."""

    def price(H, u):
        model = sr.quadratic.dense(H, u)
        solution = sr.iobs(model, jnp.zeros(DIM), K_KEPT, **rule)
        # The first step where there is one only: the bare one can be worse than zero.
        last = solution.history.objective[0]
        return last if rule.get("max_steps") == 1 else solution.objective

    return jax.jit(lambda H, u: jax.lax.map(lambda pair: price(*pair), (H, u)))


hessians = {
    name: np.stack([draw(rng) for _ in range(DRAWS)]) for name, draw in families.items()
}
points = rng.normal(size=(DRAWS, DIM))
best = {
    name: np.array(
        [best_price(H, u, K_KEPT) for H, u in zip(stack, points, strict=True)]
    )
    for name, stack in hessians.items()
}
ratios = {}
for name, rule in rules.items():
    price = price_of(rule)
    ratios[name] = {
        family: np.asarray(price(stack, points)) / best[family]
        for family, stack in hessians.items()
    }
print("median price over the best (and how often the best)")
print(" " * 29 + "".join(f"{family:>19}" for family in families))
for name, found in ratios.items():
    texts = (
        f"{np.median(r):6.2f} ({np.mean(r < 1 + 1e-9):4.0%})" for r in found.values()
    )
    print(f"{name:29}" + "".join(f"{text:>19}" for text in texts))
for family in families:
    prices = [np.median(ratios[name][family]) for name in rules]
    assert all(np.min(ratios[name][family]) >= 1 - 1e-9 for name in rules), (
        "no rule beats the exact search"
    )
    assert prices[0] > 1.15 * prices[1], "the OBS update matters more than the support"
    assert prices[3] <= min(1.5, prices[1]), "backward beats top-k, within 1.5"
    assert prices[4] <= 1.05, "exchanges: within 5 % of the best support in the median"

# %%
figure, ax = plt.subplots(figsize=(8, 3.8))
places = np.arange(len(rules))
for index, family in enumerate(families):
    values = [np.median(ratios[name][family]) for name in rules]
    high = [np.quantile(ratios[name][family], 0.9) for name in rules]
    ax.barh(
        places + 0.26 * (index - 1), np.array(values) - 1, 0.24, left=1, label=family
    )
    ax.plot(high, places + 0.26 * (index - 1), "|", color=f"C{index}", ms=8)
ax.set_xscale("log")
ax.set_xticks([1, 2, 5, 10], ["1", "2", "5", "10"])
ax.set_xticks([], minor=True)
ax.set_yticks(places, list(rules))
ax.invert_yaxis()
ax.set(
    xlabel="price over the best: median (bar), 90 % quantile (tick)",
    title="Cheap supports",
)
_ = ax.legend(fontsize="small", loc="lower right")

# %% [markdown]
# The refit matters more than the support, and the support more than the formula of the
# saliency. The default takes the best exchange of one weight for another, scored after
# the full refit, in every step until nothing moves: that comes closest.
