"""The configuration: the rule of every key, and the step counts that follow from it.

A key, its default and its range are in configs/default.py; its type is that of the default.
"""

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
from hccr_jax.paths import expand
from hccr_jax.runtime.workdir import replace_text


@dataclasses.dataclass(frozen=True)
class Rule:
    """The allowed values of a key: a type, and a closed range or a set of words."""

    kind: type
    low: float = 0
    high: float = math.inf
    words: tuple[str, ...] = ()

    def allowed(self) -> str:
        """Returns the rule as text."""
        if self.words:
            return "one of " + ", ".join(self.words)
        if self.kind in (int, float):
            name = "a whole number" if self.kind is int else "a number"
            return f"{name} from {self.low}" + f" to {self.high}" * (self.high < math.inf)
        return "True or False" if self.kind is bool else "a text"

    def admits(self, value: Any) -> bool:
        """Returns whether a value obeys the rule."""
        number: Any = int | float if self.kind is float else self.kind
        if not isinstance(value, number) or (isinstance(value, bool) and self.kind is not bool):
            return False
        if self.kind in (int, float):
            return math.isfinite(value) and self.low <= value <= self.high
        return not self.words or value in self.words


# Keys of version 0.1 and their current names. 0.2 accepts them, with a warning.
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
LOCAL_ROWS = 64  # on a device, from which batch norm does without those of the others

_RENAMED_VALUES = {"data.name": {"strokes": "synthetic"}}

# A resume may change these: they do not change the course of a run.
FREE_ON_RESUME = (
    "num_steps", "num_epochs", "log_every_steps", "watchdog_seconds", "skip_non_finite",
    "data.data_dir", "data.placement", "checkpoint.", "eval.",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Steps:
    """Lengths in steps, from a config and the number of training records."""

    total: int
    per_epoch: int
    warmup: int
    decay: int
    eval_every: int

    def evaluates(self, step: int) -> bool:
        """Returns whether the network is evaluated after a number of steps."""
        return step % self.eval_every == 0 or step == self.total


def flatten(tree: ConfigDict | Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value) of every leaf of a config or of nested dicts."""
    for key, value in tree.items():
        if isinstance(value, ConfigDict | Mapping):
            yield from ((f"{key}.{inner}", leaf) for inner, leaf in flatten(value))
        else:
            yield key, value


def _rule(key: str, default_value: Any) -> Rule:
    limits, kind = default.LIMITS.get(key, ()), type(default_value)
    if key == "model.name":
        limits = tuple(registry.MODELS)
    return Rule(kind, words=limits) if kind is str else Rule(kind, *limits)


RULES = {key: _rule(key, value) for key, value in flatten(default.get_config())}


def upgrade_leaf(key: str, value: Any) -> tuple[str, Any]:
    """Returns the current key and value for those of any earlier version.

    >>> upgrade_leaf("eval.views", 3)
    ('eval.tta_views', 3)
    """
    key = RENAMED.get(key, key)
    return key, _RENAMED_VALUES.get(key, {}).get(value, value)


def upgrade(values: Mapping[str, Any]) -> tuple[ConfigDict, list[str]]:
    """Returns a config with the current keys from one of any earlier version.

    Keys and values that were renamed get their current names; a key that did not exist yet gets
    its default, which leaves a run as it was then.

    Args:
      values: a config, as nested dicts.

    Returns:
      the config, and the old keys found in it; keys that no version had stay as they are.
    """
    old_keys, config = [], default.get_config()
    del config.data.strokes  # renamed as a whole
    # Old keys last: a config file that sets one started from today's default of the new one.
    with config.ignore_type():
        for old, value in sorted(flatten(ConfigDict(values)), key=lambda leaf: leaf[0] in RENAMED):
            key, value_now = upgrade_leaf(old, value)
            if (key, value_now) != (old, value):
                old_keys.append(old)
            *groups, last = key.split(".")
            node = config
            for group in groups:
                if group not in node:
                    node[group] = ConfigDict()
                node = node[group]
            node[last] = value_now
    expand_paths(config)
    return config, old_keys


def expand_paths(config: ConfigDict) -> None:
    """Replaces `~` at the start of every path in a config, as `paths.expand` does."""
    for key, value in list(flatten(config)):
        if key in default.PATHS and str(value).startswith("~"):
            config.update_from_flattened_dict({key: str(expand(value))})


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
    leaves = dict(flatten(config))
    for key, value in leaves.items():
        if not RULES[key].admits(value):
            raise InputError(f"config.{key}={value!r}: must be {RULES[key].allowed()}")
    model_options(config)
    if (config.num_steps > 0) == (config.num_epochs > 0):
        raise InputError(
            f"config.num_steps={config.num_steps} and config.num_epochs={config.num_epochs:g}: one "
            f"must be positive, the other 0; give both flags to change which"
        )
    for is_wrong, key, reason in _conflicts(config):
        if is_wrong:
            raise InputError(f"config.{key}={leaves[key]!r}: {reason}")


def _conflicts(config: ConfigDict) -> list[tuple[bool, str, str]]:
    """Returns whether keys contradict each other, which is to blame, and why."""
    augment, data, optimizer = config.augment, config.data, config.optimizer
    strict = config.strict_determinism
    return [
        (augment.resize_min > augment.resize_max, "augment.resize_min",
         f"must not be above augment.resize_max={augment.resize_max}"),
        (augment.once and config.loss.mirrored_as_uniform, "loss.mirrored_as_uniform",
         "needs images that are mirrored again in each epoch; set augment.once=False"),
        (optimizer.name == "adam" and optimizer.weight_decay > 0, "optimizer.weight_decay",
         "adam has none; set optimizer.name=adamw"),
        (strict and config.model.batch_norm == "local", "strict_determinism",
         "needs the default of config.model.batch_norm"),
        (strict and config.reduce_dtype != "float32", "strict_determinism",
         "needs the default of config.reduce_dtype"),
        (not data.data_dir, "data.data_dir", "must be the folder of all data sets, such as data"),
        (2 * data.margin_px >= data.image_px, "data.margin_px",
         f"must be below half of data.image_px={data.image_px}"),
    ]  # fmt: skip


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
    num_microbatches = config.gradient_accumulation_steps
    whole = "the shards of strict_determinism" if shards else "the number of devices"
    if num_microbatches > 1:
        whole += f" × gradient_accumulation_steps={num_microbatches}"
    for key, size, unit, name in (
        ("batch_size", config.batch_size, (shards or num_devices) * num_microbatches, whole),
        ("eval.batch_size", config.eval.batch_size, num_devices, "the number of devices"),
    ):
        if size % unit:
            below, above = size // unit * unit, -(-size // unit) * unit
            near = f"{below} or {above}" if below else str(above)
            raise InputError(
                f"config.{key}={size}: must be a multiple of {unit}, {name}, such as {near}"
            )


def batch_norm(config: ConfigDict, num_devices: int) -> str:
    """Returns "global" or "local" for a config's `model.batch_norm`.

    "auto" is local where each of several devices has rows enough for statistics of its own: global
    ones make the devices wait for one another twice in each layer.
    """
    choice = config.model.batch_norm
    if choice != "auto":
        return choice
    rows = config.batch_size // config.gradient_accumulation_steps // num_devices
    return "local" if num_devices > 1 and rows >= LOCAL_ROWS else "global"


def strict_shards(config: ConfigDict) -> int:
    """Returns in how many shards a batch is computed whatever the devices; 0: one per device."""
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


def check_resume(config: ConfigDict, path: Path, num_devices: int = 1) -> None:
    """Checks that a config continues the run that `path` (a config.json) describes.

    Raises:
      InputError: names the first key that would change the run's course, with both values.
    """
    try:
        old_config = upgrade(json.loads(path.read_text(encoding="utf-8")))[0]
    except ValueError as error:
        raise InputError(f"{path}: damaged: {error}: choose another --workdir") from error
    old = dict(flatten(old_config))
    if batch_norm(config, num_devices) == batch_norm(old_config, num_devices):
        old["model.batch_norm"] = config.model.batch_norm
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
