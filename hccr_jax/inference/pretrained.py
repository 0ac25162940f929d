"""Trained networks: a run's best weights with all that is needed to use them, or to start from."""

import dataclasses
from pathlib import Path
from typing import Any

from jax.sharding import Sharding
from ml_collections import ConfigDict

from hccr_jax import config as config_lib
from hccr_jax.errors import InputError
from hccr_jax.inference.network import Network, create_network
from hccr_jax.runtime import sharding
from hccr_jax.runtime.checkpoints import Checkpoints
from hccr_jax.runtime.workdir import find_checkpoints

NORMAL_FORM = ("image_px", "margin_px", "aspect")  # a network is tied to what it has seen
MEMBER = "member"  # the item of a checkpoint with the parameters of an ensemble member


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A trained network.

    Attributes:
      network: with the trained parameters and the batch statistics to evaluate with.
      classes: the characters, in the order of the logits.
      config: the requested one, with the network and the normal form of the run that trained it.
      step: that the weights are of.
      validation: the scores that chose the step; empty where nothing was validated.
      source: the folder of the checkpoint.
    """

    network: Network
    classes: tuple[str, ...]
    config: ConfigDict
    step: int
    validation: dict[str, float]
    source: Path


def load_pretrained(
    path: str | Path, config: ConfigDict | None = None, network: Network | None = None
) -> Pretrained:
    """Returns the network of the best step of a run.

    Args:
      path: folder of a run, or its folder checkpoints.
      config: how to use it; the network, the images' normal form, the training split and which of
        its labels were shuffled are the run's own. None: as the run itself evaluates.
      network: of that run, where it is at hand, compiled.

    Raises:
      InputError: there is no such folder, or no whole checkpoint in it.
    """
    folder = find_checkpoints(path)
    with Checkpoints(folder) as checkpoints:
        step = checkpoints.best_step()
        if step is None:
            raise InputError(
                f"{folder}: no checkpoint in this folder; give the --workdir of a run that has "
                f"saved one, or its folder checkpoints"
            )
        about = checkpoints.metadata(step)
        trained, classes = config_lib.upgrade(about["config"])[0], tuple(about["classes"])
        if unknown := [key for key in trained.model if f"model.{key}" not in config_lib.RULES]:
            raise InputError(
                f"{folder / str(step)}: written by another version of hccr_jax, whose networks "
                f"have the option {unknown[0]}"
            )
        config = (config or trained).copy_and_resolve_references()
        config.model.update(trained.model)
        # The seed determines which labels were shuffled.
        kept = (*NORMAL_FORM, "label_noise", "train_split")
        config.data.update({key: trained.data[key] for key in kept})
        config.seed = trained.seed
        network = network or create_network(config, len(classes))
        names = "params", "eval_batch_stats", MEMBER
        abstract_items = dict(zip(names, network.variables, strict=True))
        items = restore_items(checkpoints, step, abstract_items, sharding.replicated(network.mesh))
        params, batch_stats, member = (items[name] for name in names)
        network = dataclasses.replace(network, params=params, batch_stats=batch_stats)
        network = network.with_member_params(member)
        scores = checkpoints.metrics(step)
    return Pretrained(network, classes, config, step, scores, folder / str(step))


def restore_items(
    checkpoints: Checkpoints, step: int, abstract_items: dict[str, Any], sharding: Sharding
) -> dict[str, Any]:
    """Returns items of a step like `Checkpoints.restore`, also those written by hccr_jax 0.1.

    There the parameters of the ensemble member, now the item `MEMBER`, are stored among the batch
    statistics, as "mqdf".
    """
    member = abstract_items[MEMBER]
    if member is None or (checkpoints.folder / str(step) / MEMBER).is_dir():
        return checkpoints.restore(step, abstract_items, sharding)
    items = abstract_items | {MEMBER: None}
    items["eval_batch_stats"] = items["eval_batch_stats"] | {"mqdf": member}
    if "progress" in items:
        averages = items["progress"]["batch_stats"] | {"mqdf": member}
        items["progress"] = items["progress"] | {"batch_stats": averages}
    items = checkpoints.restore(step, items, sharding)
    items[MEMBER] = items["eval_batch_stats"].pop("mqdf")
    if "progress" in items:
        items["progress"]["batch_stats"].pop("mqdf")
    return items


def set_mqdf_weight(pretrained: Pretrained, weight: float) -> Pretrained:
    """Returns a network with another weight of its ensemble member MQDF.

    Args:
      pretrained: a network with MQDF.
      weight: 0 for the network alone.
    """
    config = pretrained.config.copy_and_resolve_references()
    config.model.mqdf_weight = weight
    params, batch_stats, member = pretrained.network.variables
    network = create_network(config, len(pretrained.classes)).with_member_params(member)
    network = dataclasses.replace(network, params=params, batch_stats=batch_stats)
    return dataclasses.replace(pretrained, config=config, network=network)
