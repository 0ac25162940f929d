"""The configuration: every key with its rule, and the step counts that follow from it."""

import dataclasses
import difflib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from hccr_jax.configs import default
from hccr_jax.errors import InputError
from hccr_jax.models import registry
from hccr_jax.runtime.workdir import replace_text


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a key may hold: a type and a closed range, or a set of words."""

    kind: type
    low: float = -math.inf
    high: float = math.inf
    words: tuple[str, ...] = ()

    def allowed(self) -> str:
        """Returns the rule in words."""
        if self.words:
            return "one of " + ", ".join(self.words)
        name = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}
        bounds = "" if self.low == -math.inf else f" from {self.low}"
        bounds += "" if self.high == math.inf else f" to {self.high}"
        return name[self.kind] + bounds

    def admits(self, value: Any) -> bool:
        """Returns whether a value obeys the rule."""
        number: Any = int | float if self.kind is float else self.kind
        if not isinstance(value, number) or (isinstance(value, bool) and self.kind is not bool):
            return False
        if self.kind in (int, float):
            return math.isfinite(value) and self.low <= value <= self.high
        return not self.words or value in self.words


_SHARE = Rule(float, 0, 1)
_COUNT = Rule(int, 1)
_TINY = 1e-12

RULES: dict[str, Rule] = {
    "seed": Rule(int, 0, 2**31 - 1),
    "num_steps": Rule(int, 0),
    "num_epochs": Rule(float, 0),
    "init_from": Rule(str),
    "batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "steps_per_execution": Rule(int, 0, 10_000),
    "log_every_steps": _COUNT,
    "watchdog_seconds": Rule(float, 0, 1e6),
    "skip_non_finite": Rule(bool),
    "strict_determinism": Rule(bool),
    "reduce_dtype": Rule(str, words=("float32", "bfloat16")),
    "model.name": Rule(str, words=tuple(registry.MODELS)),
    "model.width": Rule(float, 0.05, 8),
    "model.stem_stride": Rule(int, 1, 2),
    "model.first_stride": Rule(int, 1, 2),
    "model.head_channels": Rule(int, 8, 65_536),
    "model.dropout_rate": Rule(float, 0, 0.99),
    "model.batch_norm_epsilon": Rule(float, _TINY, 1),
    "model.batch_norm": Rule(str, words=("global", "local")),
    "model.batch_norm_momentum": Rule(float, 0, 0.999999),
    "model.batch_norm_ramp": Rule(bool),
    "model.lda_dims": Rule(int, 1, 512),
    "model.eigenvectors": Rule(int, 1, 512),
    "model.minor_variance": Rule(float, 1e-6, 1000),
    "model.mqdf_weight": Rule(float, 0, 100),
    "model.dtype": Rule(str, words=("auto", "float32", "bfloat16")),
    "data.name": Rule(str),
    "data.data_dir": Rule(str),
    "data.image_px": Rule(int, 16, 512),
    "data.margin_px": Rule(int, 0, 255),
    "data.aspect": Rule(str, words=("keep", "adaptive")),
    "data.placement": Rule(str, words=("auto", "stream", "device")),
    "data.train_split": Rule(str),
    "data.validation_split": Rule(str),
    "data.test_split": Rule(str),
    "data.label_noise": _SHARE,
    "data.mix_synthetic": Rule(bool),
    "data.synthetic.num_characters": Rule(int, 2, 3755),
    "data.synthetic.num_train_writers": Rule(int, 2, 100_000),
    "data.synthetic.num_test_writers": Rule(int, 1, 100_000),
    "data.synthetic.cursiveness": Rule(float, 0, 1),
    "augment.flip_left_right_prob": _SHARE,
    "augment.flip_up_down_prob": _SHARE,
    "augment.rotate_prob": _SHARE,
    "augment.rotate_deg": Rule(float, 0, 180),
    "augment.resize_prob": _SHARE,
    "augment.resize_min": Rule(float, 0.05, 20),
    "augment.resize_max": Rule(float, 0.05, 20),
    "augment.zoom": Rule(float, 0, 0.9),
    "augment.shear": Rule(float, 0, 2),
    "augment.shift_px": Rule(float, 0, 256),
    "augment.elastic_px": Rule(float, 0, 64),
    "augment.stroke_width": _SHARE,
    "augment.erase_prob": _SHARE,
    "augment.erase_max_side": Rule(float, 0.05, 1),
    "augment.noise_std": Rule(float, 0, 1),
    "augment.transpose_prob": _SHARE,
    "augment.crop_min": Rule(float, 0.05, 1),
    "augment.contrast": _SHARE,
    "augment.brightness": _SHARE,
    "augment.once": Rule(bool),
    "loss.label_smoothing": Rule(float, 0, 0.99),
    "loss.noise_rate": Rule(float, 0, 0.99),
    "loss.mirrored_as_uniform": Rule(bool),
    "teacher.checkpoint": Rule(str),
    "teacher.precompute": Rule(bool),
    "teacher.weight": _SHARE,
    "teacher.temperature": Rule(float, 0.1, 100),
    "optimizer.name": Rule(str, words=("adam", "adamw", "muon", "sgd")),
    "optimizer.learning_rate": Rule(float, _TINY, 1000),
    "optimizer.batch_rule": Rule(str, words=("none", "sqrt", "linear")),
    "optimizer.reference_batch_size": _COUNT,
    "optimizer.schedule": Rule(str, words=("exponential", "cosine", "constant")),
    "optimizer.warmup_epochs": Rule(float, 0),
    "optimizer.decay_rate": Rule(float, _TINY, 1),
    "optimizer.decay_epochs": Rule(float, _TINY),
    "optimizer.staircase": Rule(bool),
    "optimizer.end_learning_rate": Rule(float, 0, 1000),
    "optimizer.weight_decay": Rule(float, 0, 10),
    "optimizer.clip_norm": Rule(float, 0),
    "optimizer.average_decay": Rule(float, 0, 0.999999),
    "checkpoint.every_steps": _COUNT,
    "checkpoint.keep_latest": _COUNT,
    "checkpoint.keep_best": _COUNT,
    "eval.every_steps": Rule(int, 0),
    "eval.batch_size": _COUNT,
    "eval.tta_views": Rule(int, 1, 5),
    "eval.tta_flips": Rule(bool),
    "eval.upright_prior": _SHARE,
    "eval.batch_norm_batches": Rule(int, 0, 100_000),
    "eval.robustness": Rule(bool),
    "eval.robustness_images": Rule(int, 0),
    "eval.paper_protocol": Rule(bool),
    "eval.label_errors": Rule(int, 0, 10_000),
    "eval.rejection_images": Rule(int, 0, 100_000),
}

# Keys of version 0.1, with their names of today. They go on working, with a warning, in 0.2.
RENAMED = {
    "steps_per_call": "steps_per_execution",
    "data.strokes.num_characters": "data.synthetic.num_characters",
    "data.strokes.num_train_writers": "data.synthetic.num_train_writers",
    "data.strokes.num_test_writers": "data.synthetic.num_test_writers",
    "data.strokes.haste": "data.synthetic.cursiveness",
    "data.mix_strokes": "data.mix_synthetic",
    "loss.mirrored_unknown": "loss.mirrored_as_uniform",
    "teacher.once": "teacher.precompute",
    "eval.views": "eval.tta_views",
    "eval.flip_views": "eval.tta_flips",
    "eval.suspects": "eval.label_errors",
}
_RENAMED_VALUES = {"data.name": {"strokes": "synthetic"}}

# A resume may change these: they leave the run's course as it was.
FREE_ON_RESUME = (
    "num_steps",
    "num_epochs",
    "log_every_steps",
    "watchdog_seconds",
    "skip_non_finite",
    "data.data_dir",
    "data.placement",
    "checkpoint.",
    "eval.",
)


@dataclasses.dataclass(frozen=True)
class Steps:
    """Lengths in steps, from a config and the number of training records."""

    total: int
    per_epoch: int
    warmup: int
    decay: int
    eval_every: int

    def evaluates(self, step: int) -> bool:
        """Returns whether the network is evaluated after so many steps."""
        return step % self.eval_every == 0 or step == self.total


def flatten(tree: ConfigDict | Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value) of every leaf of a config or of nested dicts."""
    for key, value in tree.items():
        if isinstance(value, ConfigDict | Mapping):
            yield from ((f"{key}.{inner}", leaf) for inner, leaf in flatten(value))
        else:
            yield key, value


def upgrade(values: Mapping[str, Any]) -> tuple[ConfigDict, list[str]]:
    """Returns a config with today's keys from one of any earlier version.

    Keys and values that were renamed get their names of today; a key that did not exist yet gets
    its default, which leaves a run as it was then.

    Args:
      values: a config, as nested dicts.

    Returns:
      the config, and the old names found in it; keys that no version had stay as they are.
    """
    leaves, found = dict(flatten(default.get_config())), []
    for old, value in flatten(ConfigDict(values)):
        key = RENAMED.get(old, old)
        leaves[key] = _RENAMED_VALUES.get(key, {}).get(value, value)
        if (key, leaves[key]) != (old, value):
            found.append(old)
    nested: dict[str, Any] = {}
    for key, value in leaves.items():
        *groups, last = key.split(".")
        node = nested
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = value
    return ConfigDict(nested), found


def unknown_key(key: str) -> InputError:
    """Returns the error for a key that does not exist, naming the nearest ones that do."""
    near = difflib.get_close_matches(key, RULES, n=2, cutoff=0.5)
    last = key.rsplit(".", 1)[-1]
    near = near or [rule for rule in RULES if rule.rsplit(".", 1)[-1] == last][:2]
    hint = f"did you mean {' or '.join(near)}?" if near else "see configs/default.py for all keys"
    return InputError(f"config has no key {key!r}: {hint}")


def check_keys(config: ConfigDict) -> None:
    """Checks that a config has every key and no other.

    Raises:
      InputError: names a key.
    """
    keys = [key for key, _ in flatten(config)]
    for key in keys:
        if key not in RULES:
            raise unknown_key(key)
    missing = sorted(set(RULES) - set(keys))
    if missing:
        raise InputError(f"config lacks the key {missing[0]!r}: start from configs/default.py")


def check(config: ConfigDict) -> None:
    """Checks every key, type and range of a config.

    Raises:
      InputError: names the key, the value and what is allowed.
    """
    check_keys(config)
    for key, value in flatten(config):
        if not RULES[key].admits(value):
            raise InputError(f"config.{key}={value!r}: must be {RULES[key].allowed()}")
    model_options(config)
    if (config.num_steps > 0) == (config.num_epochs > 0):
        raise InputError(
            f"config.num_steps={config.num_steps} and config.num_epochs={config.num_epochs:g}: one "
            f"must be positive, the other 0; give both flags to change which"
        )
    if config.augment.resize_min > config.augment.resize_max:
        raise InputError(
            f"config.augment.resize_min={config.augment.resize_min}: must not be above "
            f"augment.resize_max={config.augment.resize_max}"
        )
    if config.augment.once and config.loss.mirrored_as_uniform:
        raise InputError(
            "config.loss.mirrored_as_uniform=True: goes with images mirrored anew in each epoch; set "
            "augment.once=False"
        )
    if config.optimizer.name == "adam" and config.optimizer.weight_decay > 0:
        raise InputError(
            f"config.optimizer.weight_decay={config.optimizer.weight_decay:g}: adam has none; set "
            f"optimizer.name=adamw"
        )
    if config.strict_determinism:
        for key in ("model.batch_norm", "reduce_dtype"):
            if dict(flatten(config))[key] not in ("global", "float32"):
                raise InputError(
                    f"config.strict_determinism=True: goes with the default of config.{key}"
                )
    if 2 * config.data.margin_px >= config.data.image_px:
        raise InputError(
            f"config.data.margin_px={config.data.margin_px}: must be below half of "
            f"data.image_px={config.data.image_px}"
        )


def model_options(config: ConfigDict) -> dict[str, Any]:
    """Returns the keys of `config.model` that the network takes, with their values.

    Raises:
      InputError: names a key that was set and that the network does not have.
    """
    model, own = config.model, registry.network_options(config.model.name)
    options = {option for name in registry.MODELS for option in registry.network_options(name)}
    if model.name == "mqdf":
        options.add("mqdf_weight")
    for key, initial in default.get_config().model.items():
        if key in options and key not in own and model[key] != initial:
            raise InputError(
                f"config.model.{key}={model[key]!r}: {model.name} has no such option; leave it at "
                f"{initial!r}"
            )
    return {key: model[key] for key in own}


def check_devices(config: ConfigDict, num_devices: int) -> None:
    """Checks that batches can be split evenly over the devices.

    Raises:
      InputError: names the key and the nearest sizes that fit.
    """
    shards = strict_shards(config)
    if shards % num_devices:
        raise InputError(
            f"config.strict_determinism=True: needs a number of devices that divides {shards}, not "
            f"{num_devices}"
        )
    parts = config.gradient_accumulation_steps
    whole = "the parts of strict_determinism" if shards else "the number of devices"
    whole += f" × gradient_accumulation_steps={parts}" if parts > 1 else ""
    for key, size, unit, name in (
        ("batch_size", config.batch_size, (shards or num_devices) * parts, whole),
        ("eval.batch_size", config.eval.batch_size, num_devices, "the number of devices"),
    ):
        if size % unit:
            below, above = size // unit * unit, -(-size // unit) * unit
            near = f"{below} or {above}" if below else str(above)
            raise InputError(
                f"config.{key}={size}: must be a multiple of {unit}, {name}, such as {near}"
            )


def strict_shards(config: ConfigDict) -> int:
    """Returns in how many parts a batch is computed whatever the devices; 0 for no such parts."""
    return 8 if config.strict_determinism else 0


def resolve(config: ConfigDict, num_records: int) -> Steps:
    """Returns the step counts of a run.

    Args:
      config: passed by `check`.
      num_records: size of the training split.

    Raises:
      InputError: the batch is larger than the split.
    """
    if config.batch_size > num_records:
        raise InputError(
            f"config.batch_size={config.batch_size}: more than the {num_records} training images"
        )

    def steps(epochs: float) -> int:
        # Rounded down, as the paper's code: int(897,758 / 256 · 2.5) = 8,767.
        return max(1, int(num_records / config.batch_size * epochs))

    warmup = config.optimizer.warmup_epochs
    total = config.num_steps or steps(config.num_epochs)
    return Steps(
        total=total,
        per_epoch=steps(1.0),
        warmup=steps(warmup) if warmup > 0 else 0,
        decay=steps(config.optimizer.decay_epochs),
        eval_every=config.eval.every_steps or steps(1.0),
    )


def save(config: ConfigDict, path: Path) -> None:
    """Writes a config as JSON."""
    replace_text(path, json.dumps(config.to_dict(), indent=2) + "\n")


def check_resume(config: ConfigDict, path: Path) -> None:
    """Checks that a config continues the run that `path` (a config.json) describes.

    Raises:
      InputError: names the first key that would change the run's course, with both values.
    """
    try:
        old = dict(flatten(upgrade(json.loads(path.read_text(encoding="utf-8")))[0]))
    except ValueError as error:
        raise InputError(f"{path}: damaged: {error}: choose another --workdir") from error
    for key, value in flatten(config):
        bound = not key.startswith(FREE_ON_RESUME)
        # With a cosine the length of the run shapes every step of it.
        bound |= key in ("num_steps", "num_epochs") and config.optimizer.schedule == "cosine"
        if not bound or old.get(key) == value:
            continue
        raise InputError(
            f"config.{key}={value!r}, but the run was started with {old[key]!r} ({path}): "
            f"resume with the old value or choose another --workdir"
        )
