"""Flax modules on smaller arrays: sizes that follow the arrays, not the constructor.

`resized` runs any function on smaller arrays and needs nothing of this. Here is what
lets the code of the model itself run on them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from flax import nnx

    Module = TypeVar("Module", bound=nnx.Module)
else:
    Module = TypeVar("Module")


@contextlib.contextmanager
def linen_sizes() -> Iterator[None]:
    """Within it, linen layers take their sizes from the params they are given.

    ```python
    with sparserec.structure.linen_sizes():
        outputs = network.apply(variables, batches[0], train=False)
    ```

    For `Dense`, `DenseGeneral` (and so attention), `Conv`, `ConvTranspose` and `Embed`:
    `features` are those of the kernel, the number of groups of a convolution that of
    its inputs. Where queries and keys got narrower, attention divides by another root:
    see `keep_temperature`. Sizes that a module of yours writes out in a reshape are
    beyond reach; `resized` has no such limits. It works at trace time: enter it inside
    the function that is jitted, or around its first call.

    Yields:
      Nothing.
    """
    from flax import linen

    def interceptor(
        call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: Any
    ) -> Any:
        module = context.module
        sizes = {}
        if context.method_name in ("setup", "__call__"):
            sizes = _linen_layer(module, args[0] if args else kwargs.get("inputs"))
        before = {name: getattr(module, name) for name in sizes}
        # Bound modules are frozen; the sizes are put back whatever happens.
        for name, size in sizes.items():
            object.__setattr__(module, name, size)
        try:
            return call(*args, **kwargs)
        finally:
            for name, size in before.items():
                object.__setattr__(module, name, size)

    with linen.intercept_methods(interceptor):
        yield


def _linen_layer(module: Any, inputs: Any) -> dict[str, Any]:
    """The sizes of one layer; nothing for others, and before there are params."""
    from flax import linen

    name = "embedding" if isinstance(module, linen.Embed) else "kernel"
    if not module.has_variable("params", name):
        return {}
    shape = module.get_variable("params", name).shape
    if isinstance(module, linen.Dense | linen.Embed):
        return {"features": shape[-1]}
    if isinstance(module, linen.DenseGeneral):
        if isinstance(module.features, int):
            return {"features": shape[-1]}
        return {"features": tuple(shape[-len(module.features) :])}
    if isinstance(module, linen.ConvTranspose):
        return {"features": shape[-2 if module.transpose_kernel else -1]}
    if isinstance(module, linen.Conv):
        groups = inputs.shape[-1] // shape[-2]
        return {"features": shape[-1], "feature_group_count": groups}
    return {}


def nnx_sizes(module: Module) -> Module:
    """Sets the sizes that nnx layers remember to those of their arrays.

    ```python
    model = sparserec.structure.nnx_sizes(model)
    ```

    After `nnx.merge(graphdef, small)` layers hold the small arrays and the old numbers.
    `Linear`, `LinearGeneral`, `Conv`, `ConvTranspose`, `Embed`, normalizations and
    `MultiHeadAttention` are put right. Of a grouped convolution whose outputs got fewer
    and whose inputs for each group did not, whole groups are taken to be gone where
    that is possible. Where queries and keys got narrower, see `keep_temperature`.

    Args:
      module: an nnx module, which is changed in place.

    Returns:
      The same module.
    """
    from flax import nnx

    layers = [layer for _, layer in nnx.iter_modules(module)]
    for layer in layers:
        for name, size in _nnx_layer(layer).items():
            setattr(layer, name, size)
    # Attention reads its sizes off the projections, which are right by now.
    for layer in layers:
        if isinstance(layer, nnx.MultiHeadAttention):
            layer.in_features = layer.query.in_features[0]
            layer.num_heads, layer.head_dim = layer.query.out_features
            layer.num_kv_heads = layer.key.out_features[0]
            layer.qkv_features = layer.num_heads * layer.head_dim
            layer.out_features = layer.out.out_features[0]
    return module


def _nnx_layer(layer: Any) -> dict[str, Any]:
    from flax import nnx

    if isinstance(layer, nnx.Linear):
        ins, outs = layer.kernel.shape
        return {"in_features": ins, "out_features": outs}
    if isinstance(layer, nnx.LinearGeneral):
        first, last = len(layer.batch_axis), len(layer.out_features)
        shape = layer.kernel.shape
        return {
            "in_features": tuple(shape[first : len(shape) - last]),
            "out_features": tuple(shape[len(shape) - last :]),
        }
    if isinstance(layer, nnx.Conv):
        return _nnx_convolution(layer)
    if isinstance(layer, nnx.ConvTranspose):
        ins, outs = layer.kernel.shape[-2:]
        if layer.transpose_kernel:
            ins, outs = outs, ins
        shape = layer.kernel.shape
        return {"in_features": ins, "out_features": outs, "kernel_shape": shape}
    if isinstance(layer, nnx.Embed):
        return {"features": layer.embedding.shape[-1]}
    if isinstance(layer, nnx.BatchNorm | nnx.LayerNorm | nnx.RMSNorm):
        arrays: list[Any] = [getattr(layer, n, None) for n in ("scale", "bias", "mean")]
        widths = [math.prod(a.shape) for a in arrays if getattr(a, "shape", None)]
        return {"num_features": widths[0]} if widths else {}
    return {}


def _nnx_convolution(layer: Any) -> dict[str, Any]:
    ins, outs = layer.kernel.shape[-2:]
    groups = layer.feature_group_count
    each = layer.out_features // groups
    same = ins == layer.in_features // groups
    if same and outs % each == 0:
        groups = outs // each
    return {
        "in_features": ins * groups,
        "out_features": outs,
        "feature_group_count": groups,
        "kernel_shape": layer.kernel.shape,
    }
