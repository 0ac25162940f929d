"""Several processes that train one network: start, agreement and end.

Only the primary process prints and writes files.
"""

import os
import sys
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from hccr_jax.errors import InputError

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize(timeout_seconds: float) -> None:
    """Joins this process to others if the environment defines them, before JAX's first use.

    JAX_COORDINATOR_ADDRESS is host:port of process 0, JAX_NUM_PROCESSES the number of processes and
    JAX_PROCESS_ID the index of this one, from 0; JAX_LOCAL_DEVICE_IDS, such as 0 or 0,1, may assign
    GPUs of the host to it. Only process 0 writes to standard output.

    Args:
      timeout_seconds: a process without a heartbeat for so long is lost.

    Raises:
      InputError: a variable is missing or wrong.
      ConnectionError: the other processes were not found.
    """
    if not os.environ.get("JAX_NUM_PROCESSES"):
        return
    address, count, index = (os.environ.get(name, "") for name in VARIABLES)
    for name, value in zip(VARIABLES[1:], (count, index), strict=True):
        if not value.isdecimal():
            raise InputError(f"{name}={value!r}: must be a whole number")
    if not int(index) < int(count):
        raise InputError(f"JAX_PROCESS_ID={index}: must be below JAX_NUM_PROCESSES={count}")
    if not address.rpartition(":")[2].isdecimal():
        raise InputError(f"{VARIABLES[0]}={address!r}: must be host:port of process 0")
    # It would intercept SIGTERM, which `signals` handles.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            address,
            int(count),
            int(index),
            cluster_detection_method="deactivate",
            heartbeat_timeout_seconds=max(10, int(timeout_seconds)),
            shutdown_timeout_seconds=60,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConnectionError(f"process {index} of {count} found no others: {reason}") from error
    if int(index) > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def is_initialized() -> bool:
    """Returns whether this process has joined others."""
    return jax.distributed.is_initialized()


def is_primary() -> bool:
    """Returns whether this is the process that writes files and prints."""
    return jax.process_index() == 0


def broadcast(value: int) -> int:
    """Returns the primary process's value; all must call it, in step."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int64(value)))


def shutdown(code: int) -> NoReturn:
    """Ends the process; a failed one at once, without waiting for threads or other processes.

    JAX's own shutdown is a barrier of all processes; the others notice the loss by themselves.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if code not in (0, 143):
        os._exit(code)
    sys.exit(code)
