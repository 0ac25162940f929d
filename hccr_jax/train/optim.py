"""Learning-rate schedules and optimisers."""

from collections.abc import Mapping
from typing import Any

import jax
import optax
from optax import contrib

from hccr_jax.models.packing import Packed, pack

MUON_RMS = 0.8  # of the change of a convolution's weights, in units of the learning rate


def make_schedule(
    name: str,
    learning_rate: float,
    *,
    total_steps: int,
    warmup_steps: int = 0,
    decay_rate: float = 1.0,
    decay_steps: int = 1,
    staircase: bool = False,
    end_learning_rate: float = 0.0,
) -> optax.Schedule:
    """Returns the learning rate as a function of the step, counted from 0.

    Args:
      name: "exponential" (the paper's: learning_rate · decay_rate^(step / decay_steps)), "cosine"
        (half a wave from learning_rate to end_learning_rate) or "constant".
      learning_rate: the peak.
      total_steps: length of the run, warm-up included.
      warmup_steps: steps of linear rise before the schedule starts; the first step already moves.
      decay_rate, decay_steps, staircase: of "exponential"; a staircase rounds the exponent down.
      end_learning_rate: of "cosine".

    Raises:
      ValueError: decay_steps or total_steps below 1 (Optax would silently keep the rate constant).

    >>> options = {"decay_rate": 0.94, "decay_steps": 8767, "staircase": True}
    >>> schedule = make_schedule("exponential", 1e-3, total_steps=160_000, **options)
    >>> f"{float(schedule(160_000)):.2e}"
    '3.28e-04'
    """
    if decay_steps < 1 or total_steps < 1:
        raise ValueError(f"decay_steps={decay_steps}, total_steps={total_steps}: must be positive")
    first = learning_rate / max(1, warmup_steps)
    if name == "exponential":
        return optax.warmup_exponential_decay_schedule(
            first, learning_rate, warmup_steps, decay_steps, decay_rate, staircase=staircase
        )
    if name == "cosine":
        end = max(total_steps, warmup_steps + 1)
        return optax.warmup_cosine_decay_schedule(
            first, learning_rate, warmup_steps, end, end_learning_rate
        )
    return optax.warmup_constant_schedule(first, learning_rate, warmup_steps)


def make_optimizer(
    name: str,
    schedule: optax.Schedule,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    weight_decay: float = 0.0,
    clip_norm: float = 0.0,
) -> optax.GradientTransformation:
    """Returns the optimiser of `Packed` parameters.

    Args:
      name: "adam", "adamw", "sgd" (Nesterov momentum beta1) or "muon": the weights of a convolution
        that is not depthwise, a matrix, are updated by the orthogonal matrix nearest to their
        momentum, all others as with "adamw".
      schedule: learning rate by step.
      beta1, beta2: of Adam.
      weight_decay: decoupled, of all but "adam"; not of vectors, such as batch norm and biases.
      clip_norm: largest global norm of the gradient; 0: no clipping.

    Source: Muon: https://kellerjordan.github.io/posts/muon/; changes of one size for any shape:
    https://arxiv.org/abs/2502.16982.
    """
    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm > 0 else []
    decay = _decay_matrices(weight_decay) if weight_decay > 0 else None
    if name == "sgd":
        steps = [decay] * (decay is not None) + [optax.trace(beta1, nesterov=True)]
    else:
        adam = optax.scale_by_adam(beta1, beta2)
        steps = [_muon_or(adam) if name == "muon" else adam]
        steps += [decay] * (name != "adam" and decay is not None)
    return optax.chain(*clip, *steps, optax.scale_by_learning_rate(schedule))


def _decay_matrices(rate: float) -> optax.GradientTransformation:
    """Returns weight decay of all but vectors."""

    def decay(updates: Packed, params: Packed) -> Packed:
        return jax.tree.map(lambda u, p: u + rate * p, updates, params.matrices())

    return optax.masked(optax.stateless(decay), True)  # whose state is that of former versions


def _on_leaves(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns an optimiser of `Packed` parameters from one of pytrees of arrays."""

    def update(updates: Packed, state: Any, params: Packed) -> tuple[Packed, Any]:
        leaves, state = inner.update(updates.unpack(), state, params.unpack())
        return pack(leaves), state

    return optax.GradientTransformation(lambda params: inner.init(params.unpack()), update)


def _on_vector(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns an optimiser of pytrees of arrays from one of `Packed` parameters."""

    def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        packed, state = inner.update(pack(updates), state, pack(params))
        return packed.unpack(), state

    return optax.GradientTransformation(lambda params: inner.init(pack(params)), update)


def _muon_or(other: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns Muon for the weights (h, w, inputs, outputs) of convolutions, else the other."""
    matrix = contrib.MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=(3,))
    muon = contrib.scale_by_muon(
        weight_dimension_numbers=lambda params: jax.tree.map(lambda leaf: matrix, params)
    )

    def to_rms(update: jax.Array, _: Any) -> jax.Array:
        outputs = update.shape[3]
        return update * (MUON_RMS * max(outputs, update.size // outputs) ** 0.5)

    def label(params: Mapping[str, Any]) -> Any:
        return jax.tree.map(lambda leaf: "muon" if leaf.ndim == 4 else "other", params)

    muon = optax.chain(muon, optax.stateless_with_tree_map(to_rms))
    return _on_leaves(optax.partition({"muon": muon, "other": _on_vector(other)}, label))
