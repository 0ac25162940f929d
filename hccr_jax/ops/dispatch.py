"""Dispatch of a depthwise layer to its fastest implementation, looked up in measurements.

`measured/` holds the output of `hccr benchmark --suite=kernels --output=FILE` on some devices: a
table instead of a measurement at start, because a run is a function of its config.
Implementations:

  kernels   fused, in C++, for float32 on a CPU with a compiler (`cpu_kernels.cc`)
  pallas    fused, for NVIDIA GPUs from Ampere on (`depthwise_pallas.py`)
  grouped   XLA's own grouped convolution, batch norm separate
  shifted   a sum of nine shifted products, batch norm separate

In training, where "pallas" is available, it is one of the kernels of whole blocks (`blocks.py`).
"""

import collections
import functools
import json
import os
import pathlib

import jax
import jax.numpy as jnp

from hccr_jax.ops import native, target

MEASURED = pathlib.Path(__file__).with_name("measured")
FUSED = ("kernels", "pallas")  # the fastest wherever it was measured


def available(x: jax.Array) -> list[str]:
    """Returns the implementations that support x (B, H, W, C) on the devices of this process."""
    fused = ["kernels"] * native.supports(x) + ["pallas"] * _runs_pallas(target.device())
    return [*fused, "grouped", "shifted"]


def _runs_pallas(device: jax.Device) -> bool:
    """Returns whether a device is an NVIDIA GPU of the generation Ampere or later."""
    capability = str(getattr(device, "compute_capability", ""))  # such as "9.0"; others' "gfx90a"
    major, _, minor = capability.partition(".")
    return major.isdecimal() and minor.isdecimal() and int(major) >= 8


def fuses_blocks() -> bool:
    """Returns whether training runs the kernels of whole blocks, `blocks.py`.

    The environment variable HCCR_BLOCK_KERNELS=0 disables them.
    """
    return os.environ.get("HCCR_BLOCK_KERNELS") != "0" and _runs_pallas(target.device())


def choose(x: jax.Array, stride: int) -> str:
    """Returns the implementation to use for x (B, H, W, C).

    It is the fastest in the measurement of this kind of device, dtype and layer; for a layer that
    was not measured, the one that was fastest most often on such a device; on devices never
    measured, the fused one where available, else "shifted" on a CPU and "grouped" elsewhere.
    """
    implementations = available(x)
    layer = (*x.shape[1:], stride)
    ranking = _rankings().get((target.device().device_kind, jnp.dtype(x.dtype).name), {})
    for implementation in [*ranking.get(layer, []), *_by_wins(ranking), *FUSED]:
        if implementation in implementations:
            return implementation
    return "shifted" if target.is_cpu() else "grouped"


def _by_wins(ranking: dict[tuple[int, ...], list[str]]) -> list[str]:
    wins = collections.Counter(ranked[0] for ranked in ranking.values())
    return [implementation for implementation, _ in wins.most_common()]


@functools.cache
def _rankings() -> dict[tuple[str, str], dict[tuple[int, ...], list[str]]]:
    """Returns the implementations, fastest first, by (device kind, dtype) and then by layer."""
    speeds = collections.defaultdict(lambda: collections.defaultdict(list))  # type: ignore[var-annotated]
    for path in sorted(MEASURED.glob("*.json")):
        for row in json.loads(path.read_text("utf-8"))["rows"]:
            about = row["about"]
            if "error" not in row:
                device = about["device_kind"], about["dtype"]
                speed = row["images_per_second"], row["row"].rpartition("/")[2]
                speeds[device][tuple(about["layer"])].append(speed)
    return {
        device: {
            layer: [implementation for _, implementation in sorted(found, reverse=True)]
            for layer, found in layers.items()
        }
        for device, layers in speeds.items()
    }
