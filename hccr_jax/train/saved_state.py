"""What a checkpoint of a training run holds, and how the run goes on from it."""

import dataclasses
from typing import Any

import jax

from hccr_jax.inference.pretrained import MEMBER, restore_items
from hccr_jax.models.packing import unpack_nodes
from hccr_jax.runtime import sharding
from hccr_jax.runtime.checkpoints import Checkpoints, check_classes
from hccr_jax.train.setup import TrainingSetup
from hccr_jax.train.state import TrainState, pack_state


def checkpoint_metadata(setup: TrainingSetup) -> dict[str, Any]:
    """Returns the JSON object saved with a checkpoint's arrays."""
    return {"classes": list(setup.train.classes), "config": setup.config.to_dict()}


def checkpoint_items(
    setup: TrainingSetup, state: TrainState, eval_batch_stats: Any
) -> dict[str, Any]:
    """Returns the pytrees that a checkpoint holds, by name.

    Args:
      setup: of the run; its network has the fitted ensemble member, if any.
      state: the run's, unpacked.
      eval_batch_stats: batch-norm statistics that its parameters are evaluated with.
    """
    progress = {"step": state.step, "batch_stats": state.batch_stats, "opt_state": state.opt_state}
    if state.average_params is not None:
        progress["params"] = state.params
    items = {"params": state.eval_params, "eval_batch_stats": eval_batch_stats}
    return items | {"progress": progress, MEMBER: setup.network.variables.member}


def restore_state(
    setup: TrainingSetup, checkpoints: Checkpoints
) -> tuple[TrainingSetup, TrainState]:
    """Returns the setup and state of the newest checkpoint, or the initial ones.

    The setup's network gets the ensemble member that the run was started with.
    """
    step = checkpoints.latest_step()
    if step is None:
        return setup, setup.initial
    check_classes(checkpoints.metadata(step)["classes"], setup.train.classes, checkpoints.folder)
    initial = jax.eval_shape(unpack_nodes, setup.initial)
    abstract_items = checkpoint_items(setup, initial, initial.batch_stats)
    placement = sharding.replicated(setup.network.mesh)
    items = restore_items(checkpoints, step, abstract_items, placement)
    print(f"resuming at step {step}")
    name = "params" if initial.average_params is None else "average_params"
    params = {name: items["params"]}
    network = setup.network.with_member_params(items[MEMBER])
    state = TrainState(seed=setup.initial.seed, **params, **items["progress"])
    return dataclasses.replace(setup, network=network), pack_state(setup.initial, state)
