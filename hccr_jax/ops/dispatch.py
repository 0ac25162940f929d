"""The form of a depthwise layer that runs fastest, looked up in measurements.

`measured/` holds what `hccr benchmark --suite=forms --output=FILE` wrote on some
devices. The forms:

  kernels   fused, in C++, for float32 on a CPU with a compiler (`cpu_kernels.cc`)
  pallas    fused, for NVIDIA GPUs from Ampere on (`depthwise_pallas.py`)
  grouped   XLA's own grouped convolution, batch norm beside it
  shifted   a sum of nine shifted products, batch norm beside it
"""

import collections
import functools
import json
import pathlib

import jax
import jax.numpy as jnp

from hccr_jax.ops import native

MEASURED = pathlib.Path(__file__).with_name("measured")
FUSED = ("kernels", "pallas")  # the fastest wherever it was measured


def possible(x: jax.Array) -> list[str]:
    """Returns the forms that can take x (B, H, W, C) on the devices at hand."""
    forms = ["kernels"] * native.supports(x) + ["pallas"] * _runs_pallas(jax.devices()[0])
    return [*forms, "grouped", "shifted"]


def _runs_pallas(device: jax.Device) -> bool:
    """Returns whether a device is an NVIDIA GPU of the generation Ampere or later."""
    capability = str(getattr(device, "compute_capability", ""))  # such as "9.0"; others' "gfx90a"
    major, _, minor = capability.partition(".")
    return major.isdecimal() and minor.isdecimal() and int(major) >= 8


def choose(x: jax.Array, stride: int) -> str:
    """Returns the form to use for x (B, H, W, C).

    That is the fastest in the measurement of this kind of device, dtype and layer; for a layer that
    was not measured, the one that won most often on such a device; on devices never measured, the
    fused one where it can be had, else "shifted" on a CPU and "grouped" elsewhere.
    """
    forms = possible(x)
    layer = (*x.shape[1:], stride)
    ranking = _rankings().get((jax.devices()[0].device_kind, jnp.dtype(x.dtype).name), {})
    for form in [*ranking.get(layer, []), *_by_wins(ranking), *FUSED]:
        if form in forms:
            return form
    return "shifted" if jax.default_backend() == "cpu" else "grouped"


def _by_wins(ranking: dict[tuple[int, ...], list[str]]) -> list[str]:
    wins = collections.Counter(forms[0] for forms in ranking.values())
    return [form for form, _ in wins.most_common()]


@functools.cache
def _rankings() -> dict[tuple[str, str], dict[tuple[int, ...], list[str]]]:
    """Returns the forms, fastest first, by device kind and dtype and then by layer."""
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
            layer: [form for _, form in sorted(found, reverse=True)]
            for layer, found in layers.items()
        }
        for device, layers in speeds.items()
    }
