"""Whole units of ResNet20 removed: which choice of units loses least.

    python -m benchmarks.structure --json structure.json     # needs SPARSEREC_DATA

The floating point operations of ResNet20 are cut by two and by three. Every method
works in the same number of stages on the same examples, sees the same prices, has its
batch statistics estimated again after every stage, and the same short fine-tuning:

- joint: `structure.joint`, all units together on one quadratic model over gates;
- per unit: the quadratic model of one unit at a time, `structure.gate_scores`;
- OBA, Taylor, magnitude: scores of weights summed over the units.

Accuracies are those on the lossless part of CIFAR-10 (846 test images, dense 91 %), or
on its JPEG copy (`--images jpeg`, dense 83 %), and comparable only with each other. The
exit status is 1 where the joint choice is not the best of a column, or a product with
the Hessian takes more than 2.1 gradients.
"""

import argparse
import functools
import os
import pathlib
import sys
import time

for _name, _value in (
    ("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"),
    ("OPENBLAS_NUM_THREADS", "1"),
):
    os.environ.setdefault(_name, _value)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

from benchmarks import _resnet20 as resnet20  # noqa: E402
from benchmarks._output import save  # noqa: E402
from sparserec import quadratic, saliency, structure  # noqa: E402
from sparserec.saliency._oba import gradient_and_product  # noqa: E402
from sparserec.structure._gate_model import gate_model, gate_scores  # noqa: E402
from sparserec.structure._joint import joint  # noqa: E402

HVP_LIMIT = 2.1  # gradients


def predict(variables, images):
    return resnet20.apply(variables["params"], variables["stats"], images)


BUILDER = quadratic.gauss_newton(predict, quadratic.softmax_cross_entropy)


def loss_of_params(params, stats, images, labels):
    return BUILDER.loss({"params": params, "stats": stats}, images, labels)


# --- the methods: variables, groups, budget, data -> variables with units removed -----


def masked(variables, groups, keep):
    mask = structure.mask(variables, groups, keep)
    return jax.tree.map(lambda m, w: jnp.where(m, w, 0), mask, variables)


def weight_scores(score):
    """Scores of weights summed over units; the sign goes after the sum."""

    def scores(variables, groups, data, options):
        loss = jax.tree_util.Partial(loss_with_stats, variables["stats"])
        each = score(loss, variables["params"], data, options)
        zeros = jax.tree.map(jnp.zeros_like, variables["stats"])
        summed = structure.unit_scores(groups, {"params": each, "stats": zeros})
        return {name: np.abs(np.asarray(s)) for name, s in summed.items()}

    return scores


def loss_with_stats(stats, params, images, labels):
    return loss_of_params(params, stats, images, labels)


def quadratic_scores(variables, groups, data, options):
    model = gate_model(
        BUILDER.loss,
        variables,
        groups,
        args=data,
        curvature=options.curvature,
        probes=options.probes,
        batch_size=options.batch_size,
    )
    return {name: np.asarray(s) for name, s in gate_scores(model).items()}


SCORES = {
    "per unit": quadratic_scores,
    "OBA": weight_scores(
        lambda loss, params, data, options: saliency.oba(
            loss, params, args=data, batch_size=options.batch_size
        )
    ),
    "Taylor": weight_scores(
        lambda loss, params, data, options: saliency.taylor(
            loss, params, args=data, batch_size=options.batch_size
        )
    ),
    "magnitude": weight_scores(
        lambda loss, params, data, options: saliency.magnitude(params)  # noqa: ARG005
    ),
}
METHODS = ["joint", *SCORES]


def repaired(variables, images):
    """Batch statistics of the weights as they are now."""
    params = variables["params"]
    stats = resnet20.estimate_stats(params, images, batch_size=len(images))
    return {"params": params, "stats": stats}


def by_scores(method, variables, groups, budget, batches, repair, options):
    """Geometric stages, scores computed again in each, dead units stay dead."""
    whole = structure.total_cost(groups)
    keep = {name: np.ones(size, bool) for name, size in groups.sizes.items()}
    for stage in range(options.stages):
        now = repair(masked(variables, groups, keep)) if stage else variables
        scores = SCORES[method](now, groups, batches(stage), options)
        lowest = min(float(s.min()) for s in scores.values()) - 1
        scores = {n: np.where(keep[n], s, lowest) for n, s in scores.items()}
        share = (stage + 1) / options.stages
        limit = whole * (budget / whole) ** share
        limit = budget if share == 1 else limit
        chosen = structure.select(
            groups, scores, limit, multiple_of=options.multiple_of
        )
        keep = {n: chosen[n] & keep[n] for n in keep}
        keep = {n: k if k.any() else chosen[n] for n, k in keep.items()}
    return masked(variables, groups, keep), keep


def by_gates(variables, groups, budget, batches, repair, options):
    solution = joint(
        BUILDER.loss,
        variables,
        groups,
        budget,
        batches=batches,
        stages=options.stages,
        repair=repair,
        curvature=options.curvature,
        probes=options.probes,
        batch_size=options.batch_size,
        multiple_of=options.multiple_of,
    )
    gated = structure.gate(variables, groups, solution.params)
    keep = {name: np.asarray(m) for name, m in solution.mask.items()}
    return masked(gated, groups, keep), keep


def prune(method, *given):
    if method == "joint":
        return by_gates(*given)
    return by_scores(method, *given)


# --- after pruning -------------------------------------------------------------------


OPTIMIZER = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.01, 0.9, True))


@jax.jit
def train_step(params, mask, state, images, labels):
    def loss(params):
        live = jax.tree.map(lambda m, w: jnp.where(m, w, 0), mask, params)
        logits, _ = resnet20.apply(live, {}, images, train=True)
        return quadratic.softmax_cross_entropy(logits, labels)

    gradient = jax.grad(loss)(params)
    updates, state = OPTIMIZER.update(gradient, state, params)
    return optax.apply_updates(params, updates), state


def fine_tuned(params, mask, network, options, seed):
    rng = np.random.default_rng(1000 + seed)
    state = OPTIMIZER.init(params)
    images, labels = network.train
    for _ in range(options.steps):
        chosen = rng.choice(len(labels), 64, replace=False)
        pixels = resnet20.augment(images[chosen], rng)
        params, state = train_step(
            params, mask, state, resnet20.normalize(pixels), labels[chosen]
        )
    return jax.tree.map(lambda m, w: jnp.where(m, w, 0), mask, params)


def judged(params, network, options):
    """Test accuracy with batch statistics estimated again."""
    stats = resnet20.estimate_stats(params, network.train[0][: options.recalibration])
    images, labels = (x[: options.tests] for x in network.test)
    return resnet20.accuracy(params, stats, images, labels)


def seconds(call, clock=time.perf_counter):
    """Seconds of one call, warmed up."""
    jax.block_until_ready(call())
    begin = clock()
    jax.block_until_ready(call())
    return clock() - begin


def compared(first, second, clock=time.perf_counter, repeats=7):
    """Least seconds of two calls side by side: busy moments hit both."""
    pairs = [(seconds(first, clock), seconds(second, clock)) for _ in range(repeats)]
    return [float(least) for least in np.min(pairs, axis=0)]


def forward_ratio(variables, groups, keep):
    """Processor time of the whole network over that of the shrunken one.

    On one thread that is the ratio of wall-clock times on an idle machine.
    """
    images = jnp.zeros((64, 32, 32, 3))
    small = structure.shrink(variables, groups, keep)
    fast = jax.jit(structure.resized(predict, groups, keep))
    whole = jax.jit(predict)
    slow, quick = compared(
        lambda: whole(variables, images),
        lambda: fast(small, images),
        time.process_time,
    )
    return slow / quick


def products(variables):
    """Processor seconds of a gradient and a score, batch of 32, and its memory."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(32, 32, 32, 3)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 10, 32), jnp.int32)
    loss = jax.tree_util.Partial(loss_with_stats, variables["stats"])
    params = variables["params"]
    gradient = jax.jit(jax.grad(loss))
    hessian = quadratic.Hessian(dense_limit=0)
    product = functools.partial(gradient_and_product, hessian, loss, params)
    # Processor time: on one thread it is what an idle machine would take.
    once, both = compared(
        lambda: gradient(params, images, labels),
        lambda: product((images, labels)),
        time.process_time,
    )
    lowered = gradient_and_product.lower(hessian, loss, params, (images, labels))
    memory = lowered.compile().memory_analysis()
    return {
        "gradient_s": once,
        "score_s": both,
        "ratio": both / once,
        "bytes_of_a_batch": int(memory.temp_size_in_bytes),
    }


def parsed():
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--cuts", type=float, nargs="+", default=[2.0, 3.0])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--stages", type=int, default=6)
    parser.add_argument("--examples", type=int, default=256, help="in every stage")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--curvature", default="fisher")
    parser.add_argument("--probes", type=int)
    parser.add_argument("--multiple-of", type=int, default=1, help="of all widths")
    parser.add_argument("--steps", type=int, default=20, help="of fine-tuning")
    parser.add_argument("--tests", type=int, default=2000)
    parser.add_argument("--recalibration", type=int, default=1500, help="images")
    parser.add_argument("--repair", type=int, default=150, help="the same in a stage")
    parser.add_argument("--images", default="lossless", choices=["jpeg", "lossless"])
    parser.add_argument("--json", type=pathlib.Path)
    return parser.parse_args()


def main():
    options = parsed()
    if not resnet20.available():
        return 0
    network = resnet20.load(options.images)
    images, labels = network.train
    stats = resnet20.estimate_stats(network.params, images[: options.recalibration])
    variables = {"params": network.params, "stats": stats}
    groups = structure.groups(predict, variables, jnp.zeros((1, 32, 32, 3)))
    whole = structure.total_cost(groups)
    dense = judged(network.params, network, options)
    print(f"{len(groups.groups)} groups, {sum(groups.sizes.values())} units")
    print(f"dense: {dense:.2f} %, {whole / 1e6:.1f} M operations an image", flush=True)
    cost = products(variables)
    print(f"score / gradient, batch of 32: {cost['ratio']:.2f} (limit {HVP_LIMIT})")
    print(f"memory of a score: {cost['bytes_of_a_batch'] / 2**20:.0f} MiB, any batches")

    results = []
    for cut in options.cuts:
        for method in options.methods:
            for seed in options.seeds:
                rng = np.random.default_rng(seed)
                order = rng.permutation(len(labels))

                def batches(stage, order=order):
                    start = stage * options.examples % (len(order) - options.examples)
                    chosen = order[start : start + options.examples]
                    return resnet20.normalize(images[chosen]), jnp.asarray(
                        labels[chosen]
                    )

                repair = functools.partial(
                    repaired, images=images[order[-options.repair :]]
                )
                begin = time.process_time()
                pruned, keep = prune(
                    method, variables, groups, whole / cut, batches, repair, options
                )
                spent = time.process_time() - begin
                mask = structure.mask(variables, groups, keep)["params"]
                before = judged(pruned["params"], network, options)
                tuned = fine_tuned(pruned["params"], mask, network, options, seed)
                after = judged(tuned, network, options)
                results.append(
                    {
                        "cut": cut,
                        "method": method,
                        "seed": seed,
                        "before": before,
                        "after": after,
                        "cpu_s": spent,
                        "flops": structure.total_cost(groups, "flops", keep) / whole,
                        "speed_up": forward_ratio(variables, groups, keep),
                    }
                )
                shown = {
                    k: round(v, 3) for k, v in results[-1].items() if k != "method"
                }
                print(method, shown, flush=True)
    return finish(results, cost, dense, options)


def finish(results, cost, dense, options):
    """The table, the verdict and the file."""
    good = cost["ratio"] <= HVP_LIMIT
    columns = ("before", "after", "cpu_s", "speed_up")
    rows = []
    for cut in options.cuts:
        print(f"operations cut by {cut:g}, means over seeds {options.seeds}")
        heads = ("before", "after", "CPU s", "faster")
        print("method".ljust(12), *(f"{head:>8s}" for head in heads))
        means = {}
        for method in options.methods:
            runs = [r for r in results if (r["cut"], r["method"]) == (cut, method)]
            means[method] = [float(np.mean([r[key] for r in runs])) for key in columns]
            print(method.ljust(12), *(f"{value:8.2f}" for value in means[method]))
            rows.append([cut, method, *means[method]])
        for column, name in enumerate(columns[:2]):
            best = max(means, key=lambda method: means[method][column])
            print(f"best {name} fine-tuning: {best} (target joint)")
            good &= best == "joint" or "joint" not in means
    save(
        options.json,
        ["cut", "method", "before, %", "after, %", "CPU s", "times faster"],
        rows,
        dense=dense,
        product=cost,
        results=results,
        good=good,
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
