"""Times the training step: one JSON line a row.

Examples:

  python -m hccr_jax.benchmark --config=configs/v2.py --batch_size=128
  python -m hccr_jax.benchmark --config=configs/v2.py --batch_size=128 --peer=torch

With --peer=torch (pip install 'hccr_jax[peer]') PyTorch's eager, channels-last step on the same
network is timed in turn with ours, so that a drift of the machine's speed hits both; "ratio" is the
median over the pairs.
"""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from ml_collections import ConfigDict

from hccr_jax import cli, optim, sharding
from hccr_jax.errors import InputError
from hccr_jax.models.registry import count_parameters, create_model, split_model
from hccr_jax.ops import native
from hccr_jax.train_state import create_train_state
from hccr_jax.train_step import make_train_step


def make_train_runner(
    config: ConfigDict, batch_size: int, num_classes: int
) -> tuple[Callable[[int], float], int]:
    """Returns run(num_steps) -> seconds of training on random images, and the parameter count."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    model = create_model(
        config.model.name,
        num_classes=num_classes,
        width=config.model.width,
        dropout_rate=config.model.dropout_rate,
        dtype=dtype,
        rngs=nnx.Rngs(0),
    )
    apply, params, batch_stats = split_model(model)
    optimizer = optim.make_optimizer("adam", optim.make_schedule("constant", 1e-3, total_steps=1))
    mesh = sharding.create_mesh()
    step = make_train_step(apply, optimizer, lambda keys, images: images, mesh, seed=0)
    rng = np.random.default_rng(0)
    size = config.data.image_px
    images = rng.integers(0, 256, (batch_size, size, size), dtype=np.uint8)
    labels = rng.integers(0, num_classes, batch_size, dtype=np.int32)
    batch = sharding.put_batch((images, labels), mesh)
    state = create_train_state(params, batch_stats, optimizer)
    state = jax.device_put(state, sharding.replicated(mesh))

    def run(num_steps: int) -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(num_steps):
            state, metrics = step(state, *batch)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - start

    return run, count_parameters(params)


def measure(
    runners: dict[str, Callable[[int], float]], batch_size: int, num_steps: int, repeats: int
) -> dict[str, list[float]]:
    """Returns images a second of each runner, one figure a repeat, the runners taking turns."""
    for run in runners.values():
        run(2)
    rates: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(repeats):
        for name, run in runners.items():
            rates[name].append(num_steps * batch_size / run(num_steps))
    return rates


def row(name: str, rates: list[float], parameters: int, **more: Any) -> dict[str, Any]:
    """Returns one row of the benchmark."""
    return {
        "row": name,
        "images_per_second": round(statistics.median(rates), 1),
        "min": round(min(rates), 1),
        "max": round(max(rates), 1),
        "repeats": len(rates),
        "parameters": parameters,
        **more,
    }


def main(argv: list[str]) -> int:
    """Runs the command line and returns its exit code: 0 done, 2 wrong request."""
    own = cli.define_config_flags()
    flags.DEFINE_integer("batch_size", 128, "Images a step.", lower_bound=1, flag_values=own)
    flags.DEFINE_integer("num_classes", 100, "Characters.", lower_bound=2, flag_values=own)
    flags.DEFINE_integer("num_steps", 5, "Steps a repeat.", lower_bound=1, flag_values=own)
    flags.DEFINE_integer("repeats", 7, "Repeats.", lower_bound=1, flag_values=own)
    flags.DEFINE_enum("peer", None, ["torch"], "What to time beside ours.", flag_values=own)
    try:
        cli.parse(own, argv)
        if own.help:
            print(f"{__doc__}\nFlags:{own.get_help()}")
            return 0
        return _run(own)
    except InputError as error:
        return cli.report_error(error)


def _run(values: flags.FlagValues) -> int:
    native.keep_memory()
    config, batch_size, model = values.config, values.batch_size, values.config.model
    ours, parameters = make_train_runner(config, batch_size, values.num_classes)
    runners, counts = {"train_step": ours}, {"train_step": parameters}
    if values.peer:
        try:
            from hccr_jax import torch_peer
        except ImportError as error:
            raise InputError("--peer=torch needs PyTorch: pip install 'hccr_jax[peer]'") from error
        runners["train_step/torch_eager"], counts["train_step/torch_eager"] = (
            torch_peer.make_train_runner(
                model.name,
                values.num_classes,
                model.width,
                model.dropout_rate,
                batch_size,
                config.data.image_px,
            )
        )
    rates = measure(runners, batch_size, values.num_steps, values.repeats)
    about = {
        "model": model.name,
        "batch_size": batch_size,
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "machine": platform.machine(),
        "jax": jax.__version__,
    }
    for name, figures in rates.items():
        more: dict[str, Any] = dict(about)
        if name != "train_step":
            pairs = zip(rates["train_step"], figures, strict=True)
            more["ratio"] = round(statistics.median(ours / theirs for ours, theirs in pairs), 2)
        print(json.dumps(row(name, figures, counts[name], **more), ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
