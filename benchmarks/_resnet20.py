"""ResNet20 on CIFAR-10 as plain functions of arrays, for the benchmarks.

The checkpoint and the images come from the folder that SPARSEREC_DATA names. There are
two sets of images: `"jpeg"`, all 60,000 after lossy compression, on which the dense
network has about 83 %, and `"lossless"`, the first 4,660 + 846, on which it has 91.4 %.
Accuracies are comparable within one set only.

    network = load("lossless")
    logits = apply(network.params, network.stats, normalize(network.test[0]))
    logits, batch_stats = apply(params, stats, images, train=True)

Weights are in the layout of JAX (HWIO, and (in, out) for the last layer), under the
names of the checkpoint. `python -m benchmarks._resnet20` checks the dense accuracies.
"""

import io
import os
import pathlib
import sys
import zipfile
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

CLASSES: list[str] = [  # in the order of the labels
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
]
MEAN = np.array([0.4914, 0.4822, 0.4465], np.float32)
DEVIATION = np.array([0.2023, 0.1994, 0.2010], np.float32)
BLOCKS = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1, 2)]
EPSILON = 1e-5

ImageSet = Literal["jpeg", "lossless"]
Weights = dict[str, jax.Array]


class Network(NamedTuple):
    """The checkpoint and the images it is judged by.

    Attributes:
      params: every trained array, by its name in the checkpoint; float32.
      stats: running mean and variance of every normalisation, by
        `"<layer>.running_mean"` and `"<layer>.running_var"`. As stored they belong to
        another scaling of the images: re-estimate them before use.
      train: images uint8 (m, 32, 32, 3) and labels int32 (m,), NumPy.
      test: the same for the test images.
    """

    params: Weights
    stats: Weights
    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


def available() -> bool:
    """Whether the data are there; says what to do if they are not."""
    if os.environ.get("SPARSEREC_DATA"):
        return True
    print("This benchmark needs data: set SPARSEREC_DATA to its folder.")
    return False


def load(images: ImageSet = "jpeg") -> Network:
    """Checkpoint and images; decoding the JPEG set takes some seconds."""
    folder = pathlib.Path(os.environ["SPARSEREC_DATA"])
    params, stats = {}, {}
    with np.load(folder / "resnet20_cifar10.npz") as arrays:
        for name in arrays.files:
            value = arrays[name]
            if "running" in name:
                stats[name] = jnp.asarray(value)
            elif value.ndim:  # without the counters of batches
                order = {4: (2, 3, 1, 0), 2: (1, 0)}.get(value.ndim)
                params[name] = jnp.asarray(
                    value if order is None else value.transpose(order)
                )
    if images == "lossless":
        with np.load(folder / "cifar_lossless_part.npz") as arrays:
            train, test = (
                (arrays[f"x_{part}"], arrays[f"y_{part}"].astype(np.int32))
                for part in ("train", "test")
            )
    else:
        train, test = _decode(folder / "cifar10_jpeg.zip")
    return Network(params, stats, train, test)


def _decode(archive: pathlib.Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Training and test images of the archive, classes interleaved."""
    from PIL import Image  # comes with matplotlib; only this function needs it

    parts = []
    with zipfile.ZipFile(archive) as files:
        names = [name for name in files.namelist() if name.endswith(".jpg")]
        for part in ("train", "test"):
            # By number, then class: any prefix of the data is balanced.
            chosen = sorted(
                (pathlib.PurePath(name).stem, CLASSES.index(name.split("/")[-2]), name)
                for name in names
                if name.split("/")[-3] == part
            )
            pixels = np.stack(
                [
                    np.asarray(Image.open(io.BytesIO(files.read(name))))
                    for *_, name in chosen
                ]
            )
            parts.append((pixels, np.array([c for _, c, _ in chosen], np.int32)))
    return parts


def prunable(path: str, leaf: jax.Array) -> bool:
    """The 268,336 weights that are usually pruned: no shortcuts, biases, norms."""
    del leaf
    return path.endswith("weight") and ("conv" in path or path.startswith("fc"))


def normalize(images: np.ndarray) -> jax.Array:
    """Images as the network wants them, float32."""
    scaled = images.astype(np.float32) / 255
    return jnp.asarray((scaled - MEAN) / DEVIATION)


def augment(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Random crops with a border of 4 and random flips, as in training."""
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    rows, columns = rng.integers(0, 9, (2, len(images), 1, 1))
    rows, columns = rows + np.arange(32)[None, :, None], columns + np.arange(32)
    flipped = rng.random((len(images), 1, 1)) < 0.5
    columns = np.where(flipped, columns[..., ::-1], columns)
    return padded[np.arange(len(images))[:, None, None], rows, columns]


def apply(params: Weights, stats: Weights, images: jax.Array, train: bool = False):
    """Logits, shape (m, 10); with `train` also the statistics of this batch.

    Args:
      params: as in `Network`.
      stats: as in `Network`; not read with `train`.
      images: normalised, shape (m, 32, 32, 3).
      train: normalise by the batch itself, and return `(logits, batch_stats)` with
        its means and variances, the momentum of which is zero.
    """
    logits, seen, _ = forward(params, stats, images, train)
    return (logits, seen) if train else logits


def forward(params: Weights, stats: Weights, images: jax.Array, train: bool):
    """Logits, the statistics of this batch, and the outputs of all blocks.

    Arguments as those of `apply`; outputs are arrays of shape (m, rows, columns,
    channels), in the order of `BLOCKS`.
    """
    seen: Weights = {}
    outputs: list[jax.Array] = []

    def norm(x: jax.Array, layer: str) -> jax.Array:
        mean, variance = f"{layer}.running_mean", f"{layer}.running_var"
        if train:
            seen[mean] = jnp.mean(x, axis=(0, 1, 2))
            seen[variance] = jnp.var(x, axis=(0, 1, 2))
        source = seen if train else stats
        scale = params[f"{layer}.weight"] / jnp.sqrt(source[variance] + EPSILON)
        shift = params[f"{layer}.bias"] - source[mean] * scale
        return x * scale[None, None, None] + shift[None, None, None]

    def conv(x: jax.Array, layer: str, stride: int = 1) -> jax.Array:
        kernel = params[f"{layer}.weight"]
        border = (kernel.shape[0] - 1) // 2
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            [(border, border)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    x = jax.nn.relu(norm(conv(images, "conv1"), "bn1"))
    for block in BLOCKS:
        shortcut, stride = x, 1
        if f"{block}.downsample.0.weight" in params:
            stride = 2
            shortcut = conv(x, f"{block}.downsample.0", stride)
            shortcut = norm(shortcut, f"{block}.downsample.1")
        y = jax.nn.relu(norm(conv(x, f"{block}.conv1", stride), f"{block}.bn1"))
        y = norm(conv(y, f"{block}.conv2"), f"{block}.bn2")
        x = jax.nn.relu(y + shortcut)
        outputs.append(x)
    logits = jnp.mean(x, axis=(1, 2)) @ params["fc.weight"] + params["fc.bias"][None]
    return logits, seen, outputs


_apply = jax.jit(apply, static_argnames="train")


def estimate_stats(
    params: Weights, images: np.ndarray, seed: int = 0, batch_size: int = 500
) -> Weights:
    """Mean over batches of the statistics of augmented images.

    Without augmentation the dense network loses three points: its normalisations
    have only ever seen images with black borders.
    """
    pixels = augment(images, np.random.default_rng(seed))
    seen = [
        _apply(params, {}, normalize(pixels[i : i + batch_size]), train=True)[1]
        for i in range(0, max(1, len(images) - batch_size + 1), batch_size)
    ]
    return jax.tree.map(lambda *xs: jnp.mean(jnp.stack(xs), axis=0), *seen)


def accuracy(
    params: Weights, stats: Weights, images: np.ndarray, labels: np.ndarray
) -> float:
    """Share of the images that are classified correctly, in percent."""
    hits = 0
    for start in range(0, len(images), 500):
        piece = slice(start, start + 500)
        logits = _apply(params, stats, normalize(images[piece]))
        hits += int(np.sum(np.argmax(np.asarray(logits), axis=1) == labels[piece]))
    return 100 * hits / len(images)


def main() -> int:
    if not available():
        return 0
    met = True
    wanted: dict[ImageSet, float] = {"lossless": 91.4, "jpeg": 83.0}
    for images, target in wanted.items():
        network = load(images)
        stats = estimate_stats(network.params, network.train[0][:10_000])
        value = accuracy(network.params, stats, *network.test)
        met &= abs(value - target) < 0.5
        print(f"{images}: dense accuracy {value:.2f} %, known {target} %", flush=True)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
