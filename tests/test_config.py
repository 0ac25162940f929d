"""Every key and its rule, the messages for wrong values, and the step counts of the paper."""

import importlib
import json
import math
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from hccr_jax import config as config_lib
from hccr_jax.cli import config_files
from hccr_jax.config import (
    RULES,
    Steps,
    check,
    check_devices,
    check_resume,
    flatten,
    resolve,
)
from hccr_jax.configs import default
from hccr_jax.errors import InputError
from hccr_jax.models.registry import MODELS, network_options
from hccr_jax.train.input_pipeline import BATCH_SOURCES

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("[!_]*.py"))
# HWDB1.1 as its publisher counts it, and the paper's batch.
PAPER_RECORDS, PAPER_BATCH = 897_758, 256


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def load(name: str) -> ConfigDict:
    config = importlib.import_module(f"hccr_jax.configs.{name}").get_config()
    config.lock()
    return config


def changed(name: str, **values: object) -> ConfigDict:
    """Returns a config with other values; in the names `__` stands for the dot."""
    config = load(name)
    config.update_from_flattened_dict({key.replace("__", "."): v for key, v in values.items()})
    return config


def message(name: str, **values: object) -> str:
    with pytest.raises(InputError) as caught:
        check(changed(name, **values))
    return str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_config_passes(name: str) -> None:
    # The default leaves the length of the run to those that build on it.
    check(changed(name, num_steps=10) if name == "default" else load(name))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "experiments").glob("[!_]*.py")), ids=lambda path: path.stem
)
def test_experiments_pass_and_differ(path: Path) -> None:
    names = [experiment.name for experiment in config_files.list_experiments(str(path))]
    configs = [config_files.load_config(f"{path}:{name}") for name in names]
    for config in configs:
        check(config)
    assert len(set(names)) == len({json.dumps(config.to_dict()) for config in configs}) > 1


def test_every_limit_is_of_a_key_and_admits_its_default() -> None:
    defaults = dict(flatten(load("default")))
    assert set(default.LIMITS) < set(RULES) == set(defaults)
    assert [key for key, value in defaults.items() if not RULES[key].admits(value)] == []


def test_names_are_those_that_can_be_built() -> None:
    assert set(RULES["model.name"].words) == set(MODELS)
    assert set(RULES["data.placement"].words) == {"auto", *BATCH_SOURCES}


@pytest.mark.parametrize(
    ("name", "option", "value", "default"),
    [
        ("lenet5", "dropout_rate", 0.2, 0.0),
        ("lenet5", "stem_stride", 1, 2),
        ("alexnet", "batch_norm_epsilon", 1e-5, 1e-3),
        ("resnet34", "width", 0.5, 1.0),
    ],
)
def test_an_option_that_a_network_does_not_have_is_refused(name, option, value, default) -> None:
    assert message(name, **{f"model__{option}": value}) == (
        f"config.model.{option}={value!r}: {name} has no such option; leave it at {default!r}"
    )


def test_a_weight_decay_that_would_do_nothing_is_refused() -> None:
    assert message("v2", optimizer__weight_decay=0.05) == (
        "config.optimizer.weight_decay=0.05: adam has none; set optimizer.name=adamw"
    )


def test_each_network_takes_the_options_of_its_architecture() -> None:
    mobilenet = {"width", "stem_stride", "first_stride", "dropout_rate", "batch_norm_epsilon"}
    resnet = {"stem_stride", "dropout_rate", "batch_norm_epsilon"}
    assert {name: set(network_options(name)) for name in MODELS} == {
        "mobilenet_v1": mobilenet,
        "mobilenet_v2": mobilenet | {"head_channels"},
        "lenet5": set(),
        "alexnet": {"stem_stride", "dropout_rate"},
        "resnet18": resnet,
        "resnet34": resnet,
        "resnet50": resnet,
        "mqdf": {"lda_dims", "eigenvectors", "minor_variance"},
    }


def test_the_papers_step_counts() -> None:
    # jackluchen/MobileNet_HCCR: decay_steps = int(897758 / 256 * 2.5), 160,000 steps.
    steps = resolve(load("v2"), PAPER_RECORDS)
    assert steps == Steps(total=160_000, per_epoch=3506, warmup=0, decay=8767, eval_every=3506)
    assert load("v2").batch_size == PAPER_BATCH
    # "45.6 epochs" of 160,000 steps.
    assert round(steps.total * PAPER_BATCH / PAPER_RECORDS, 1) == 45.6
    assert load("v1").model.name == "mobilenet_v1"


def test_epochs_become_steps_rounded_down() -> None:
    config = changed("hwdb100", num_epochs=1.5, batch_size=10, optimizer__warmup_epochs=0.5)
    assert resolve(config, 99).total == math.floor(9.9 * 1.5) == 14
    assert resolve(config, 99).warmup == 4
    assert resolve(config, 10).warmup == 1, "a warm-up of some length has at least one step"


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("optimizer.learning_rat", "optimizer.learning_rate"),
        ("batchsize", "batch_size"),
        ("learning_rate", "optimizer.learning_rate"),
        ("model.depth_multiplier", None),
    ],
)
def test_unknown_key_names_the_nearest(wrong: str, right: str | None) -> None:
    text = str(config_lib.unknown_key(wrong))
    assert text.startswith(f"config has no key '{wrong}'")
    assert right is None or right in text


def test_extra_and_missing_keys() -> None:
    config = changed("v2")
    with config.unlocked():
        config.optimizer.momentun = 0.9
    with pytest.raises(InputError, match=r"no key 'optimizer\.momentun'"):
        check(config)
    config = changed("v2")
    with config.unlocked():
        del config.augment.zoom
    with pytest.raises(InputError, match=r"lacks the key 'augment\.zoom'"):
        check(config)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("batch_size", -5, "a whole number from 1"),
        ("batch_size", 0, "a whole number from 1"),
        ("optimizer.learning_rate", math.nan, "a number from 1e-12 to 1000"),
        ("optimizer.learning_rate", math.inf, "a number from 1e-12 to 1000"),
        ("optimizer.learning_rate", 0.0, "a number from 1e-12 to 1000"),
        ("model.dtype", "int8", "one of auto, float32, bfloat16"),
        ("model.dropout_rate", 1.0, "a number from 0 to 0.99"),
        ("seed", -1, "a whole number from 0 to 2147483647"),
        ("seed", 2**31, "a whole number from 0 to 2147483647"),
    ],
)
def test_value_out_of_range_is_named(key: str, value: object, allowed: str) -> None:
    text = message("v2", **{key.replace(".", "__"): value})
    assert text == f"config.{key}={value!r}: must be {allowed}"


def test_value_of_a_wrong_type_is_named() -> None:
    # A config file may assign any type; a flag is converted by the type of the default.
    config = load("v2")
    with config.ignore_type():
        config.batch_size = "256"
        with pytest.raises(InputError, match=r"config\.batch_size='256': must be a whole number"):
            check(config)
        config.batch_size = True
        with pytest.raises(InputError, match=r"config\.batch_size=True: must be a whole number"):
            check(config)
        config.batch_size = 256
        config.optimizer = 1e-3
    with pytest.raises(InputError, match="no key 'optimizer'"):
        check(config)


def test_a_whole_number_will_do_for_a_number() -> None:
    config = load("hwdb100")
    with config.ignore_type():
        config.num_epochs = 15
    check(config)


@pytest.mark.parametrize("lengths", [(0, 0.0), (10, 1.0)])
def test_both_or_neither_length(lengths: tuple[int, float]) -> None:
    text = message("v2", num_steps=lengths[0], num_epochs=lengths[1])
    assert f"config.num_steps={lengths[0]} and config.num_epochs={lengths[1]:g}" in text
    assert "one must be positive, the other 0" in text


def test_values_that_contradict_each_other() -> None:
    text = message("v2", augment__resize_min=3.0)
    assert text == "config.augment.resize_min=3.0: must not be above augment.resize_max=2.5"
    text = message("v2", data__margin_px=32)
    assert text == "config.data.margin_px=32: must be below half of data.image_px=64"


def test_batch_larger_than_the_split() -> None:
    with pytest.raises(InputError, match=r"config\.batch_size=256: more than the 255 training"):
        resolve(load("v2"), 255)


def test_batches_must_split_evenly_over_the_devices() -> None:
    check_devices(load("v2"), 8)
    with pytest.raises(InputError, match=r"config\.batch_size=256: .* of 3, .* such as 255 or 258"):
        check_devices(load("v2"), 3)
    with pytest.raises(InputError, match=r"config\.batch_size=2: .* of 4, .* such as 4"):
        check_devices(changed("v2", batch_size=2), 4)
    with pytest.raises(InputError, match=r"config\.eval\.batch_size=10: .* such as 8 or 12"):
        check_devices(changed("v2", eval__batch_size=10), 4)
    check_devices(changed("v2", gradient_accumulation_steps=8), 32)
    with pytest.raises(
        InputError, match="multiple of 12, the number of devices × gradient_accumulation_steps=3"
    ):
        check_devices(changed("v2", gradient_accumulation_steps=3), 4)


def test_resume_compares_with_the_saved_config(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    config_lib.save(load("v2"), path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    check_resume(load("v2"), path)
    free = {"num_steps": 170_000, "log_every_steps": 7, "data__data_dir": "/elsewhere"}
    check_resume(changed("v2", checkpoint__every_steps=5, eval__batch_size=64, **free), path)
    for key, value in {"batch_size": 128, "seed": 1, "augment__rotate_deg": 25.0}.items():
        with pytest.raises(InputError) as caught:
            check_resume(changed("v2", **{key: value}), path)
        old = dict(flatten(load("v2")))[key.replace("__", ".")]
        assert f"config.{key.replace('__', '.')}={value!r}" in str(caught.value)
        assert f"{old!r} ({path})" in str(caught.value)


def test_a_run_of_an_older_version_is_resumed_as_it_was_then(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    old = load("v2").to_dict()
    del old["model"]["mqdf_weight"]
    old["steps_per_call"] = old.pop("steps_per_execution")
    old["data"] |= {"name": "strokes", "strokes": {"haste": 0.5}}
    del old["data"]["synthetic"]
    path.write_text(json.dumps(old))
    new = changed("v2", data__name="synthetic", data__synthetic__cursiveness=0.5)
    check_resume(new, path)
    new.model.mqdf_weight = 0.5
    with pytest.raises(InputError, match=r"config\.model\.mqdf_weight=0\.5, .* started with 0\.0"):
        check_resume(new, path)


def test_old_keys_set_by_a_config_file_count() -> None:
    config = changed("v2", eval__tta_views=2)  # the file started from today's keys
    with config.unlocked():
        config.steps_per_call = 7
        config.eval.flip_views = True
        config.data.name = "strokes"
        config.eval.new_key = 1
    new, old_keys = config_lib.upgrade(config.to_dict())
    assert sorted(old_keys) == ["data.name", "eval.flip_views", "steps_per_call"]
    assert (new.steps_per_execution, new.eval.tta_flips, new.eval.tta_views) == (7, True, 2)
    assert new.data.name == "synthetic"
    with pytest.raises(InputError, match=r"no key 'eval\.new_key'"):
        check(new)
    with new.unlocked():
        del new.eval.new_key
    check(new)


def test_renamed_keys_exist_and_their_old_names_do_not() -> None:
    assert set(config_lib.RENAMED.values()) <= set(RULES)
    assert not set(config_lib.RENAMED) & set(RULES)


def test_a_cosine_cannot_be_made_longer(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    config_lib.save(load("hwdb100"), path)
    check_resume(changed("hwdb100", log_every_steps=7), path)
    with pytest.raises(InputError, match=r"config\.num_epochs=30\.0, .* started with 15\.0"):
        check_resume(changed("hwdb100", num_epochs=30.0), path)


@pytest.mark.parametrize("content", ["", '{"seed": 0', "seed = 0"])
def test_resume_from_a_damaged_config(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"config\.json: damaged: "):
        check_resume(load("v2"), path)


@pytest.mark.parametrize(
    ("choice", "batch_size", "accumulation", "devices", "expected"),
    [
        ("auto", 4096, 1, 1, "global"), ("auto", 128, 1, 2, "local"), ("auto", 126, 1, 2, "global"),
        ("auto", 128, 2, 2, "global"), ("global", 4096, 1, 8, "global"),
        ("local", 8, 1, 8, "local"),
    ],
)  # fmt: skip
def test_devices_with_rows_enough_have_batch_statistics_of_their_own(
    choice, batch_size, accumulation, devices, expected
):
    config = changed(
        "v2", batch_size=batch_size, model__batch_norm=choice,
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    assert config_lib.batch_norm(config, devices) == expected


def test_a_run_of_another_batch_norm_is_resumed_only_where_it_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    config_lib.save(changed("v2", model__batch_norm="global", batch_size=512), path)
    auto = changed("v2", batch_size=512)
    check_resume(auto, path)
    check_resume(auto, path, num_devices=16)  # too few rows each
    with pytest.raises(InputError, match=r"config\.model\.batch_norm='auto', .* with 'global'"):
        check_resume(auto, path, num_devices=8)
