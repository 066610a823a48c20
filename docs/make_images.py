"""Draws the pictures of these pages: python docs/make_images.py [name ...]

Seeds are fixed, so a second run gives the same files. `demo.png` is not drawn here;
it is what `python -m sparserec --out docs/images/demo.png` writes.
"""

import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.figure import Figure

import sparserec
from sparserec import plot, problems, quadratic

FOLDER = pathlib.Path(__file__).parent / "images"
BLUE, RED, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"


def over_trials(solve):
    """One compiled program that runs the trials one after another."""
    return jax.jit(lambda *trials: jax.lax.map(lambda trial: solve(*trial), trials))


def save(figure, name):
    path = FOLDER / f"{name}.png"
    figure.savefig(path, dpi=130, metadata={"Software": None})
    print(path.name)


def tidy(ax):
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#dddddd", linewidth=0.7)
    ax.set_axisbelow(True)


# --- I-OBS against IHT where the condition number grows ------------------------------


def losses(draw, solve, trials):
    """Loss after every step; the last value is repeated where a solver stopped."""
    problem = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(3), trials))
    start = over_trials(lambda *args: problems.log_cosh_loss(jnp.zeros(100), *args))
    values = np.asarray(
        over_trials(lambda *args: solve(args).history.objective)(*problem.args)
    )
    values = np.concatenate([np.asarray(start(*problem.args))[:, None], values], axis=1)
    for row in values:
        last = np.flatnonzero(np.isfinite(row))[-1]
        row[last + 1 :] = row[last]
    return np.maximum(values, 1e-25)


def convergence():
    dim, k, steps, trials = 100, 10, 300, 20
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for ax, condition in zip(panels, (1e2, 1e4), strict=True):
        scale = condition**0.5

        def draw(key, condition=condition, scale=scale):
            return problems.log_cosh(key, dim, k, condition, scale)

        def by_iobs(args):
            return sparserec.iobs(
                problems.log_cosh_loss, jnp.zeros(dim), k, args=args, tol=1e-12
            )

        def by_iht(args, step_size):
            return sparserec.iht(
                problems.log_cosh_loss,
                jnp.zeros(dim),
                k,
                args=args,
                step_size=step_size,
                tol=1e-12,
                max_steps=steps,
            )

        fixed = functools.partial(by_iht, step_size=1 / (condition + scale))
        automatic = functools.partial(by_iht, step_size="auto")
        for name, solve, color in (
            ("IHT, step 1/L", fixed, GREY),
            ("IHT, automatic step", automatic, RED),
            ("I-OBS", by_iobs, BLUE),
        ):
            values = losses(draw, solve, trials)
            # Steps from one on, so that the first steps can be told apart.
            shown = np.arange(1, values.shape[1] + 1)
            for row in values:
                ax.plot(shown, row, color=color, linewidth=0.5, alpha=0.35)
            ax.plot(shown, np.median(values, axis=0), color=color, lw=2, label=name)
            print(name, condition, "solved:", np.mean(values[:, -1] < 1e-12))
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xticks([1, 2, 6, 11, 31, 101, 301], [0, 1, 5, 10, 30, 100, 300])
        ax.set_xticks([], minor=True)
        ax.set_xlim(1, steps + 1)
        ax.set_xlabel("steps taken")
        ax.set_title(f"condition number {condition:,.0f}", fontsize="medium")
        tidy(ax)
    panels[0].set_ylabel("loss (its minimum is 0)")
    panels[0].set_ylim(1e-16, 1e5)
    lines = panels[0].get_legend_handles_labels()
    figure.legend(*lines, frameon=False, loc="outside upper center", ncols=3)
    save(figure, "convergence")


# --- fewer examples than weights -----------------------------------------------------


def recovery():
    n, p, trials = 40, 100, 40
    counts = np.arange(2, 21, 2)
    designs = (
        ("independent features", problems.gaussian_design, {}),
        (
            "neighbors correlated by 0.9",
            problems.correlated_design,
            {"correlation": 0.9},
        ),
    )

    def solved(draw, solve):
        def trial(key, k):
            problem = draw(key, n, p, k)
            model = quadratic.least_squares(problem.design, problem.response)
            error = solve(model, k).params - problem.coefficients
            return jnp.linalg.norm(error) <= 1e-6 * jnp.linalg.norm(
                problem.coefficients
            )

        keys = jax.random.split(jax.random.key(6), trials)
        run = over_trials(trial)
        rates = [np.mean(run(keys, jnp.full(trials, k))) for k in counts]
        return 100 * np.asarray(rates)

    start = jnp.zeros(p)
    solvers = (
        (
            "IHT",
            lambda model, k: sparserec.iht(model, start, k, max_steps=2000, tol=1e-9),
            RED,
            "s",
        ),
        ("I-OBS", lambda model, k: sparserec.iobs(model, start, k), BLUE, "o"),
        (
            'I-OBS, schedule="up"',
            lambda model, k: sparserec.iobs(model, start, k, schedule="up"),
            GREEN,
            "D",
        ),
    )
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for ax, (title, design, options) in zip(panels, designs, strict=True):
        for name, solve, color, marker in solvers:
            rates = solved(functools.partial(design, **options), solve)
            print(title, name, dict(zip(counts.tolist(), rates.tolist(), strict=True)))
            ax.plot(counts, rates, color=color, marker=marker, ms=4, label=name)
        ax.set_title(title, fontsize="medium")
        ax.set_xlabel("nonzero weights k")
        ax.set_xticks(counts)
        ax.set_ylim(-3, 103)
        tidy(ax)
    panels[0].set_ylabel(f"recovered, % of {trials} problems")
    panels[0].legend(frameon=False, loc="lower left")
    save(figure, "recovery")


# --- the pursuit family where recovery ends ------------------------------------------


def pursuit():
    n, p, trials = 60, 150, 40
    counts = np.arange(3, 34, 3)
    start = jnp.zeros(p)
    solvers = {
        "iht": (functools.partial(sparserec.iht, max_steps=2000, tol=1e-9), GREY, ":"),
        "omp": (sparserec.omp, "#CC79A7", ":"),
        "htp": (sparserec.htp, RED, "--"),
        "subspace_pursuit": (sparserec.subspace_pursuit, "#56B4E9", "--"),
        "cosamp": (sparserec.cosamp, "#E69F00", "--"),
        "splicing": (sparserec.splicing, GREEN, "-"),
        'iobs, schedule="up"': (
            functools.partial(sparserec.iobs, schedule="up"),
            BLUE,
            "-",
        ),
        "l0cd": (functools.partial(sparserec.l0cd, max_kept=36), "black", "-"),
    }

    def solved(solve, *, signs):
        def trial(key, k):
            problem = problems.gaussian_design(key, n, p, k)
            coefficients = problem.coefficients
            size = jnp.abs(coefficients)
            coefficients = jnp.sign(coefficients)
            if not signs:
                # From 0.5 + |z|, with z normal, back to z.
                coefficients = coefficients * jnp.maximum(size - 0.5, 0)
            model = quadratic.least_squares(
                problem.design, problem.design @ coefficients
            )
            return jnp.all(solve(model, start, k).mask == (coefficients != 0))

        keys = jax.random.split(jax.random.key(8), trials)
        run = over_trials(trial)
        return 100 * np.asarray(
            [np.mean(run(keys, jnp.full(trials, k))) for k in counts]
        )

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    titles = ("values of +1 and -1", "values of very different size")
    for ax, signs, title in zip(panels, (True, False), titles, strict=True):
        for name, (solve, color, style) in solvers.items():
            rates = solved(solve, signs=signs)
            print(title, name, dict(zip(counts.tolist(), rates.tolist(), strict=True)))
            ax.plot(counts / n, rates, style, color=color, lw=1.6, label=name)
        ax.set_title(title, fontsize="medium")
        ax.set_xlabel("nonzero weights per example, k/n")
        ax.set_ylim(-3, 103)
        tidy(ax)
    panels[0].set_ylabel(f"support found, % of {trials} problems")
    lines = panels[0].get_legend_handles_labels()
    figure.legend(*lines, frameon=False, loc="outside upper center", ncols=4)
    save(figure, "pursuit")


# --- budgets as pictures -------------------------------------------------------------


def masks():
    scores = jax.random.normal(jax.random.key(0), (16, 32))
    k = scores.size // 2
    figure = Figure(figsize=(9, 1.9), layout="constrained")
    choices = (
        ("top_k(scores, 256)", sparserec.select.top_k(scores, k)),
        ("n_m(scores, 2, 4)", sparserec.select.n_m(scores, 2, 4)),
        ("blocks(scores, 256, (4, 4))", sparserec.select.blocks(scores, k, (4, 4))),
    )
    panels = figure.subplots(1, len(choices))
    for ax, (name, mask) in zip(panels, choices, strict=True):
        ax.imshow(~np.asarray(mask), cmap="gray", vmin=0, vmax=1)
        ax.set_title(name, fontsize="small", family="monospace")
        ax.set_xticks(np.arange(-0.5, 32, 4), [])
        ax.set_yticks(np.arange(-0.5, 16, 4), [])
        ax.grid(color=RED, linewidth=0.6, alpha=0.6)
        ax.tick_params(length=0)
    save(figure, "masks")


# --- groups of a residual block and of an attention block ----------------------------


def abstract(**shapes):
    return {n: jax.ShapeDtypeStruct(shape, jnp.float32) for n, shape in shapes.items()}


def residual_block(p, x):
    def conv(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    x = conv(x, p["stem"])
    h = jax.nn.relu(conv(x, p["conv1"]) * p["norm1"])
    x = jax.nn.relu(x + conv(h, p["conv2"]) * p["norm2"])
    return jnp.mean(x, axis=(1, 2)) @ p["head"]


def attention_block(p, x):
    def normed(x):
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True))

    h = normed(x)
    q, k, v = (
        jnp.einsum("btd,dhe->bthe", h, p[name]) for name in ("query", "key", "value")
    )
    h = jax.nn.dot_product_attention(q, k, v)
    x = x + jnp.einsum("bthe,hed->btd", h, p["out"])
    return x + jax.nn.gelu(normed(x) @ p["up"]) @ p["down"]


def structure():
    residual = abstract(
        stem=(3, 3, 3, 16),
        conv1=(3, 3, 16, 16),
        norm1=(16,),
        conv2=(3, 3, 16, 16),
        norm2=(16,),
        head=(16, 10),
    )
    attention = abstract(
        query=(64, 4, 16),
        key=(64, 4, 16),
        value=(64, 4, 16),
        out=(4, 16, 64),
        up=(64, 256),
        down=(256, 64),
    )
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, width_ratios=(4, 3))
    for ax, title, block, params, x, names in (
        (
            panels[0],
            "a residual block",
            residual_block,
            residual,
            (1, 8, 8, 3),
            {"conv1:2": "residual stream", "conv1:3": "inside the block"},
        ),
        (
            panels[1],
            "an attention block",
            attention_block,
            attention,
            (1, 8, 64),
            {
                "down:0": "hidden neurons",
                "key:1": "heads",
                "key:2": "query and key size",
                "out:1": "value size",
            },
        ),
    ):
        (data,) = abstract(x=x).values()
        groups = sparserec.structure.groups(block, params, data)
        plot.structure(groups, include=list(params), names=names, ax=ax)
        ax.set_title(title, fontsize="medium")
    save(figure, "structure")


# --- all k of the diabetes data ------------------------------------------------------


def path():
    from sklearn.datasets import load_diabetes

    X, y = load_diabetes(return_X_y=True)
    names = load_diabetes().feature_names
    largest = X.shape[1]

    def fit(X, y):
        standard = sparserec.recovery.regression(X, y)
        found = sparserec.recovery.path(standard.model, jnp.zeros(largest), largest)
        slope, level = standard.undo(found.params)
        return found._replace(params={"slope": slope, "level": level})

    def squared(params, X, y):
        return jnp.mean((y - params["level"] - X @ params["slope"]) ** 2)

    data = (jnp.asarray(X), jnp.asarray(y))
    found = fit(*data)
    result = sparserec.recovery.cross_validate(
        fit, squared, data, folds=10, key=jax.random.key(0)
    )
    chosen = {
        kind.upper(): int(
            sparserec.recovery.information_criterion(found, len(y), kind).k
        )
        for kind in ("aic", "bic", "ebic")
    }
    chosen["CV, one s.e."] = int(result.simplest)
    print(chosen)

    ks, variance = np.asarray(found.ks), float(np.var(y))
    fitted = 2 * np.asarray(found.objective) / len(y) / variance
    held = np.asarray(result.mean) / variance
    error = np.asarray(result.standard_error) / variance
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(ks, 100 * fitted, color=BLUE, marker="o", ms=4, label="data fitted")
    left.errorbar(
        ks, 100 * held, 100 * error, color=RED, marker="s", ms=4, lw=1, capsize=2,
        label="data left out, 10 folds",
    )  # fmt: skip
    by_k = {}
    for name, k in chosen.items():
        by_k.setdefault(k, []).append(name)
    for k, labels in by_k.items():
        left.axvline(k, color=GREY, linewidth=0.8, linestyle=":")
        left.text(
            k + 0.1, 0.97, "\n".join(labels), color=GREY, va="top", fontsize="small",
            transform=left.get_xaxis_transform(),
        )  # fmt: skip
    left.set_ylabel("variance left, %")
    left.legend(frameon=False, loc="center right")
    coefficients = np.asarray(found.params["slope"]) * np.std(X, axis=0)
    shades = matplotlib.colormaps["tab10"]
    # Names keep a distance that can be read.
    heights = np.zeros(largest)
    lowest = -np.inf
    for j in np.argsort(coefficients[-1]):
        lowest = heights[j] = max(coefficients[-1, j], lowest + 3.5)
    for j, name in enumerate(names):
        right.plot(ks, coefficients[:, j], marker="o", ms=3, lw=1.2, color=shades(j))
        right.annotate(
            name, (ks[-1], heights[j]), (6, 0), textcoords="offset points",
            va="center", fontsize="small", color=shades(j),
        )  # fmt: skip
    right.set_ylabel("coefficient of the standardized feature")
    for ax in (left, right):
        ax.set_xlabel("features kept k")
        ax.set_xticks(ks)
        tidy(ax)
    save(figure, "path")


# --- the trade-off on MLPNet ---------------------------------------------------------

RESULTS = pathlib.Path(__file__).parent.parent / "benchmarks" / "results"


def stored(parts, how=""):
    """Pairs of density and accuracy from stored tables; `how` starts the solver."""
    pairs = []
    for part in parts:
        report = json.loads((RESULTS / f"{part}.json").read_text())
        column = report["columns"].index("mean accuracy")
        pairs += [
            (float(row[0].removesuffix(" %")) / 100, row[column])
            for row in report["rows"]
            if str(row[2]).startswith(how)
        ]
    return sorted(pairs, reverse=True)


def mlpnet():
    """Drawn from the figures that `benchmarks.mlpnet` has stored."""
    variants = {
        "magnitude": "magnitude",
        "OBS (M-FAC)": "obs",
        "bso": "bso",
        "iht": "iht",
        "best": "best",
        "CBS": "cbs",
    }
    one_stage = {
        name: stored(["mlpnet_magnitude", "mlpnet_chita_variants"], how)
        for name, how in variants.items()
    }
    one_stage["iht, refined"] = stored(["mlpnet_chita_iht_refined"])
    stages = ["mlpnet_chita_stages_50", "mlpnet_chita_stages_20", "mlpnet_chita_stages"]
    several = {
        "one stage, refined": [x for x in one_stage["iht, refined"] if x[1] > 90],
        "CHITA++": stored(stages),
        "CHITA++, descent": stored(["mlpnet_chita_tuned"]),
        "I-OBS": stored(["mlpnet_fresh", "mlpnet_fresh_5", "mlpnet_fresh_2"]),
    }
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for ax, curves, title in (
        (left, one_stage, "one stage of 16,000 examples"),
        (right, several, "one stage, refined, beside 15 and 16"),
    ):
        sparserec.plot.tradeoff(curves, dense=93.97, label="test accuracy, %", ax=ax)
        ax.set_title(title)
    save(figure, "mlpnet")


PICTURES = {
    "mlpnet": mlpnet,
    "path": path,
    "convergence": convergence,
    "recovery": recovery,
    "pursuit": pursuit,
    "masks": masks,
    "structure": structure,
}


def main(names):
    # Single precision would hide the last steps of quadratic convergence.
    jax.config.update("jax_enable_x64", True)
    matplotlib.rcParams["font.size"] = 10
    FOLDER.mkdir(exist_ok=True)
    for name in names or PICTURES:
        PICTURES[name]()


if __name__ == "__main__":
    main(sys.argv[1:])
