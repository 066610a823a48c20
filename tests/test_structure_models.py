"""Well-known networks are understood completely, from shapes alone."""

import time
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import structure_models as models
from structure_cases import random_keep

from sparserec import structure

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("lenient_promotion")]

TOKENS = jax.ShapeDtypeStruct((2, 16), jnp.int32)
NETWORKS = {
    # 16 blocks of two inner widths, the stem and one width per stage.
    "resnet50": (models.images(64), 37, 25_610_152),
    # 58 layers of bottleneck and growth, the stem and three transitions.
    "densenet121": (models.images(64), 120, 8_062_504),
    # 15 expansions, 16 squeezes, 7 stage widths, the stem and the last convolution.
    "efficientnet_b0": (models.images(64), 40, 5_330_564),
    # Per layer: heads, query-key size, value size, hidden width.
    "vit_b16": (models.images(224), 48, 86_567_656),
    # Per layer: key-value heads, queries per head, value size, hidden width.
    "qwen3_decoder": (TOKENS, 112, 596_049_920),
}


@pytest.fixture(scope="module", params=NETWORKS)
def traced(request):
    args, count, params = NETWORKS[request.param]
    function, shapes = models.abstract(getattr(models, request.param), args)
    start = time.process_time()
    groups = structure.groups(function, shapes, args)
    seconds = time.process_time() - start
    return request.param, groups, count, params, seconds


def test_every_group_is_found_and_nothing_is_unknown(traced):
    name, groups, count, params, seconds = traced
    print(f"{name}: {len(groups.groups)} groups, {seconds:.2f} s")
    assert not groups.unknown
    assert len(groups.groups) == count
    assert structure.total_cost(groups, "params") == params


def test_half_the_arithmetic_is_reachable(traced):
    name, groups, *_ = traced
    rng = np.random.default_rng(0)
    scores = {name: rng.random(size) for name, size in groups.sizes.items()}
    start = time.process_time()
    whole = structure.total_cost(groups)
    share = 0.8 if name in ("vit_b16", "qwen3_decoder") else 0.5
    keep = structure.select(groups, scores, share * whole)
    print(f"{name}: select {time.process_time() - start:.2f} s")
    assert 0.95 * share * whole <= structure.total_cost(groups, "flops", keep)
    assert structure.total_cost(groups, "flops", keep) <= share * whole


def test_sizes_of_the_decoder():
    args = NETWORKS["qwen3_decoder"][0]
    function, shapes = models.abstract(models.qwen3_decoder, args, dtype=jnp.bfloat16)
    groups = structure.groups(function, shapes, args)
    expected = {8: 28, 2: 28, 128: 28, 3072: 28}
    assert Counter(groups.sizes.values()) == expected


@pytest.mark.parametrize(
    ("name", "billion_multiply_adds"), [("resnet50", 4.09), ("vit_b16", 17.56)]
)
def test_arithmetic_is_that_of_the_published_networks(name, billion_multiply_adds):
    args = models.images(224)
    function, shapes = models.abstract(getattr(models, name), args)
    groups = structure.groups(function, shapes, args)
    per_image = structure.total_cost(groups) / 2 / args.shape[0]
    np.testing.assert_allclose(per_image, 1e9 * billion_multiply_adds, rtol=1e-2)


@pytest.mark.parametrize(
    "name", ["resnet50", "densenet121", "efficientnet_b0", "vit_b16"]
)
def test_shrunk_network_equals_masked_network(name):
    args, *_ = NETWORKS[name]
    function, shapes = models.abstract(getattr(models, name), args)
    groups = structure.groups(function, shapes, args)
    rng = np.random.default_rng(0)

    def initial(path, shape):
        fan = int(np.prod(shape.shape[:-1])) if len(shape.shape) > 1 else 1
        values = rng.standard_normal(shape.shape, np.float32) / np.sqrt(fan)
        if path.endswith(("scale", "var", "/s")):
            values = 1 + 0.1 * np.abs(values)
        elif path.endswith(("mean", "bias", "/b")) and len(shape.shape) == 1:
            values = 0.1 * values
        return jnp.asarray(values, shape.dtype)

    params = {path: initial(path, shape) for path, shape in shapes.items()}
    x = jnp.asarray(rng.standard_normal(args.shape, np.float32))
    keep = random_keep(groups.sizes)
    difference = structure.check(function, params, groups, keep, x, tol=5e-6)
    print(f"{name}: {difference:.1e}")
