"""Parameters and multiply-adds of a network, layer by layer."""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Cost:
    """One layer's output shape (H, W, C), parameters and multiply-adds for one image."""

    layer: nnx.Module
    kind: str
    output: tuple[int, ...]
    parameters: int
    multiply_adds: int


_recorder: contextvars.ContextVar[list[Cost] | None] = contextvars.ContextVar(
    "recorder", default=None
)


@contextlib.contextmanager
def recording() -> Iterator[list[Cost]]:
    """Collects the cost of every layer called in the `with` block, in the order of the calls."""
    costs: list[Cost] = []
    token = _recorder.set(costs)
    try:
        yield costs
    finally:
        _recorder.reset(token)


def count_costs(model: nnx.Module, image_px: int, channels: int = 1) -> list[Cost]:
    """Returns the cost of every layer of a network for one image, by abstract evaluation.

    Args:
      model: a network, called as above.
      image_px, channels: of the image.
    """
    with recording() as costs:
        jax.eval_shape(model, jax.ShapeDtypeStruct((1, image_px, image_px, channels), jnp.float32))
    return costs


def record_cost(layer: nnx.Module, kind: str, y: jax.Array, multiply_adds: int) -> None:
    """Adds a layer's cost to the active `recording`; y is its output (B, ...)."""
    costs = _recorder.get()
    if costs is not None:
        parameters = sum(math.prod(p.shape) for p in jax.tree.leaves(nnx.state(layer, nnx.Param)))
        costs.append(Cost(layer, kind, y.shape[1:], parameters, multiply_adds))


def named_costs(model: nnx.Module, image_px: int, channels: int = 1) -> list[tuple[str, Cost]]:
    """Returns each layer's name and cost for one image, in the order of the calls."""
    names = {id(module): ".".join(map(str, path)) for path, module in nnx.iter_modules(model)}
    return [(names[id(cost.layer)], cost) for cost in count_costs(model, image_px, channels)]


def summarize(model: nnx.Module, image_px: int, channels: int = 1) -> tuple[str, int]:
    """Returns a table of the network's layers and its multiply-adds for one image.

    Multiply-adds of convolutions and dense layers, as in section 3.2 of the paper; without biases,
    batch norm (folded in inference), pooling and activations.
    """
    costs = named_costs(model, image_px, channels)
    total = sum(cost.multiply_adds for _, cost in costs)
    lines = [f"{'layer':<30}{'kind':<22}{'output':>14}{'parameters':>12}{'multiply-adds':>15}"]
    lines += [
        f"{name:<30}{cost.kind:<22}{'×'.join(map(str, cost.output)):>14}"
        f"{cost.parameters:>12,}{cost.multiply_adds:>15,}"
        for name, cost in costs
    ]
    parameters = sum(cost.parameters for _, cost in costs)
    lines.append(f"{'total':<66}{parameters:>12,}{total:>15,}")
    return "\n".join(lines), total
