"""A training step compiled for a GPU that need not be there."""

import contextlib
import dataclasses
import importlib.util
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from hccr_jax import config as config_lib
from hccr_jax.bench import hlo
from hccr_jax.bench.environment import describe_environment
from hccr_jax.errors import InputError
from hccr_jax.inference.network import compute_dtype, create_module
from hccr_jax.models.functional import count_parameters, split_model
from hccr_jax.ops import target as target_lib
from hccr_jax.runtime import sharding
from hccr_jax.train.augment import make_augment
from hccr_jax.train.input_pipeline import DeviceBatches
from hccr_jax.train.setup import (
    augment_options,
    create_optimizer,
    step_options,
    steps_per_execution,
)
from hccr_jax.train.state import create_train_state
from hccr_jax.train.step import make_train_chunk, make_train_step

LAUNCH_SECONDS, BYTES_PER_SECOND = 1.7e-6, 2.1e12  # see `predict_seconds`
RECORDS = 897_758  # of the training split, in the devices' memory; what a step reads of it is rows


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      text: its HLO.
      thunks: what the host does in an execution, as XLA writes it.
      registers: for each kind of our own kernels, the registers of a thread and the bytes that it
        spills, at most; empty without NVIDIA's ptxas.
      seconds: what tracing and compiling took.
      parameters: trained values of the network.
      dtype: that it computes in.
    """

    text: str
    thunks: str
    registers: dict[str, tuple[int, int]]
    seconds: float
    parameters: int
    dtype: str


def target_devices(name: str, count: int) -> list[Any]:
    """Returns devices to compile for.

    Args:
      name: of a file in `targets/`, a description of a GPU as XLA publishes them.
      count: how many, in one machine.

    Raises:
      InputError: JAX's CUDA plugin is missing.
    """
    text = resources.files("hccr_jax.bench").joinpath("targets", f"{name}.txtpb").read_text()
    try:
        topology = topologies.get_topology_desc(
            "", platform="cuda", target_config=text, topology=f"1x1x{count}"
        )
    except Exception as error:
        raise InputError(
            f"--target={name}: JAX cannot compile for it: pip install 'hccr_jax[cuda12]', or "
            f"cuda13, which needs no GPU ({str(error).splitlines()[0][:200]})"
        ) from error
    return list(topology.devices)


def compile_chunk(config: ConfigDict, num_classes: int, devices: list[Any]) -> Program:
    """Compiles the training program of a config: several steps, batches in the devices' memory.

    Args:
      config: passed by `config.check`; its `batch_size` is that over all devices.
      num_classes: K.
      devices: from `target_devices`.
    """
    mesh = Mesh(np.array(devices), (sharding.DATA_AXIS,), axis_types=(AxisType.Auto,))
    host = jax.default_device(jax.local_devices(backend="cpu")[0])
    with host, target_lib.compiling_for(devices[0]), tempfile.TemporaryDirectory() as name:
        start = time.perf_counter()
        lowered, parameters = _lower(config, num_classes, mesh)
        text = lowered.compile(compiler_options={"xla_dump_to": name}).as_text()
        seconds = time.perf_counter() - start
        thunks = "".join(
            path.read_text() for path in Path(name).glob("*.thunk_sequence_after_thunk_passes.txt")
        )
        return Program(
            text, thunks, _registers(text, Path(name)), seconds, parameters,
            str(compute_dtype(config)),
        )  # fmt: skip


def count(program: Program, batch_size: int) -> dict[str, Any]:
    """Returns the columns of a compiled program: what each device does in a step.

    `launches` of kernels, `gigabytes` that they read and write, the longest `chain` of kernels that
    wait for one another, the megabytes of each of the `exchanges` between devices, `graphs` and
    `host_turns` of a step, registers and spills of our own kernels, and the images a second of all
    devices by `predict_seconds`.
    """
    module = hlo.Module(program.text)
    body, _ = module.step_body()
    kernels = list(module.kernels(body))
    launches = sum(kernel.times for kernel in kernels)
    num_bytes = sum(kernel.times * kernel.num_bytes for kernel in kernels)
    exchanges = module.collectives(body)
    driven = hlo.count_host_work(program.thunks)
    speed = batch_size / predict_seconds(launches, num_bytes)
    return {
        "launches": launches,
        "gigabytes": round(num_bytes / 1e9, 3),
        "chain": module.longest_chain(body),
        "exchanges": len(exchanges),
        "exchange_megabytes": [round(size / 1e6, 6) for size in exchanges],
        **driven._asdict(),
        "registers": {kernel: used for kernel, (used, _) in program.registers.items()},
        "spilled_bytes": {kernel: spilled for kernel, (_, spilled) in program.registers.items()},
        "compile_seconds": round(program.seconds, 1),
        "predicted_images_per_second": round(speed),
    }


def predict_seconds(launches: int, num_bytes: float) -> float:
    """Returns how long a step takes on an H200, by a model of two numbers.

    They were fitted to 19 depthwise layers measured there (`ops/measured/`), which they meet within
    25 %: kernels as ours reach half of the speed of a copy. Exchanges between devices are not in
    it, see `scaling`.
    """
    return LAUNCH_SECONDS * launches + num_bytes / BYTES_PER_SECOND


def _registers(text: str, folder: Path) -> dict[str, tuple[int, int]]:
    """Returns `Program.registers` of a program whose PTX is in a folder."""
    assembler = _find_ptxas()
    own = hlo.kernel_names(text)
    found: dict[str, tuple[int, int]] = {}
    for path in folder.glob("*.ptx") if assembler else ():
        entry = re.search(r"\.entry (\w+)", path.read_text())
        kind = entry and re.sub(r"__\d+$", "", entry.group(1))
        if kind not in own:
            continue
        command = [str(assembler), "-v", "-arch=sm_90a", str(path), "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        used = max(map(int, re.findall(r"Used (\d+) registers", said)), default=0)
        spilled = max(map(int, re.findall(r"(\d+) bytes spill stores", said)), default=0)
        before = found.get(kind, (0, 0))
        found[kind] = max(used, before[0]), max(spilled, before[1])
    return dict(sorted(found.items()))


def _find_ptxas() -> Path | None:
    """Returns NVIDIA's assembler, which comes with the extras cuda12 and cuda13."""
    for package in ("nvidia.cuda_nvcc", "nvidia.cu13"):
        with contextlib.suppress(ModuleNotFoundError):
            spec = importlib.util.find_spec(package)
            for folder in (spec and spec.submodule_search_locations) or ():
                if (path := Path(folder) / "bin" / "ptxas").exists():
                    return path
    return None


def _lower(config: ConfigDict, num_classes: int, mesh: Mesh) -> tuple[Any, int]:
    apply, params, batch_stats = split_model(create_module(config, num_classes))
    optimizer, _ = create_optimizer(config, config_lib.resolve(config, RECORDS))
    step = make_train_step(
        apply, optimizer, make_augment(augment_options(config)), mesh,
        step_options(config, mesh.size),
    )  # fmt: skip
    max_steps, size = steps_per_execution(config), config.data.image_px
    train_chunk: Any = make_train_chunk(step, DeviceBatches.get_batch, max_steps)
    averages = config.optimizer.average_decay > 0
    state = jax.eval_shape(
        lambda p, s: create_train_state(p, s, optimizer, averages), params, batch_stats
    )
    whole, columns = sharding.replicated(mesh), sharding.batch_sharding(mesh, axis=1)

    def abstract(shape: tuple[int, ...], dtype: Any, placement: Any = whole) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placement)

    lowered = train_chunk.lower(
        jax.tree.map(lambda leaf: abstract(leaf.shape, leaf.dtype), state),
        abstract((), jnp.int32),
        (
            abstract((max_steps, config.batch_size), jnp.int32, columns),
            abstract((RECORDS, size, size), jnp.uint8),
            abstract((RECORDS,), jnp.int32),
        ),
    )
    return lowered, count_parameters(params)


def count_programs(
    config: ConfigDict, target: str, num_devices: int, batch_sizes: Sequence[int], num_classes: int
) -> Iterator[dict[str, Any]]:
    """Yields a row of the benchmark for each batch size.

    Args:
      config: of the network and its training.
      target: see `target_devices`.
      num_devices: to compile for.
      batch_sizes: images a step, over all devices.
      num_classes: characters.
    """
    devices = target_devices(target, num_devices)
    environment = describe_environment() | {"device": f"{num_devices} × {devices[0].device_kind}"}
    for batch_size in batch_sizes:
        config = config.copy_and_resolve_references()
        config.batch_size = batch_size
        program = compile_chunk(config, num_classes, devices)
        about = {
            "model": config.model.name, "dtype": program.dtype, "batch_size": batch_size,
            "image_px": config.data.image_px, "width": config.model.width,
            "num_classes": num_classes, "parameters": program.parameters,
        }  # fmt: skip
        columns = count(program, batch_size)
        yield {"row": "compiled_step", **columns, "about": about | environment}
