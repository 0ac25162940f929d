"""Starting a training from the weights of another run."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from hccr_jax.errors import InputError
from hccr_jax.inference.network import Network
from hccr_jax.inference.pretrained import NORMAL_FORM, Pretrained


def start_from(network: Network, classes: Sequence[str], pretrained: Pretrained) -> Network:
    """Returns a network that starts from trained weights.

    The last layer, `classifier`, is taken over character by character; a character that is new
    keeps its initial weights.

    Args:
      network: freshly initialised.
      classes: its characters, in the order of the logits.
      pretrained: of the same architecture, but for the classes.

    Raises:
      InputError: the architectures differ.
    """
    old = pretrained.network
    place = {character: index for index, character in enumerate(pretrained.classes)}
    kept = np.array([index for index, c in enumerate(classes) if c in place], int)
    taken = np.array([place[classes[index]] for index in kept], int)

    def take(fresh: Any, trained: Any, is_last: bool) -> Any:
        if isinstance(fresh, dict):
            if not isinstance(trained, dict) or fresh.keys() != trained.keys():
                raise _other_architecture(pretrained)
            return {
                key: take(fresh[key], trained[key], is_last or key == "classifier") for key in fresh
            }
        if is_last and fresh.shape[:-1] == trained.shape[:-1]:
            return fresh.at[..., kept].set(trained[..., taken])
        if fresh.shape != trained.shape:
            raise _other_architecture(pretrained)
        return trained

    params = take(network.params, old.params, False)
    batch_stats = take(network.batch_stats, old.batch_stats, False)
    return dataclasses.replace(network, params=params, batch_stats=batch_stats)


def describe_start(classes: Sequence[str], pretrained: Pretrained, config: ConfigDict) -> str:
    """Returns what `start_from` takes over, on a line, and a warning if the images look otherwise.

    Args:
      classes: the characters to train.
      pretrained: where their weights come from.
      config: of the run that starts.
    """
    kept = len(set(classes) & set(pretrained.classes))
    dropped = len(pretrained.classes) - kept
    line = (
        f"starting from {pretrained.source}: of the last layer {kept:,} characters are kept, "
        f"{len(classes) - kept:,} are new, {dropped:,} are left out"
    )
    for key in NORMAL_FORM:
        if pretrained.config.data[key] != config.data[key]:
            line += (
                f"\nwarning: it was trained with data.{key}={pretrained.config.data[key]!r}, and "
                f"not {config.data[key]!r}"
            )
    return line


def _other_architecture(pretrained: Pretrained) -> InputError:
    model = pretrained.config.model
    return InputError(
        f"{pretrained.source}: has other layers than the network to train: it is {model.name} of "
        f"width {model.width:g}"
    )
