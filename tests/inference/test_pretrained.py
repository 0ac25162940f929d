"""Weights of other runs: to use, to start from, to learn from."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from scipy.stats import entropy

from hccr_jax import main
from hccr_jax.data.casia.charset import level1
from hccr_jax.data.from_config import load
from hccr_jax.errors import InputError
from hccr_jax.inference.network import Network
from hccr_jax.inference.pretrained import Pretrained, load_pretrained
from hccr_jax.inference.steps import to_float
from hccr_jax.runtime.checkpoint_seal import write_seal
from hccr_jax.runtime.rng import AUGMENT, DROPOUT, row_keys
from hccr_jax.runtime.startup import Timeline
from hccr_jax.train.init_from import describe_start, start_from
from hccr_jax.train.setup import _load_teacher, create_training_setup


@pytest.fixture(scope="session")
def source(tiny_job: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the workdir of a run of 4 steps, validated once, at its end."""
    workdir = tmp_path_factory.mktemp("source")
    flags = ["--config.num_steps=4", "--config.optimizer.average_decay=0.3"]
    assert main.main(["main", *tiny_job, *flags, f"--workdir={workdir}"]) == 0
    return workdir


def parse(tiny_job: list[str], *flags: str):
    return main.parse(["main", *tiny_job, *flags]).config


def validated(workdir: Path) -> list[dict[str, float]]:
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if "eval/top1" in row]


def test_a_run_and_its_checkpoints_give_the_same_network(source: Path, tiny_job: list[str]) -> None:
    # The network is the run's own, whatever the config says.
    config = parse(tiny_job, "--config.model.width=1.0", "--config.data.image_px=48")
    one, other = (load_pretrained(path, config) for path in (source, source / "checkpoints"))
    assert one.classes == ("丁", "七", "三", "上", "万", "下", "一", "丈")
    assert one.step == 4
    assert one.source == source / "checkpoints" / "4"
    assert one.validation["top1"] == validated(source)[0]["eval/top1"]
    assert one.config.model.width == 0.1
    assert one.config.data.image_px == 32
    assert config.model.width == 1.0, "the caller's config is left alone"
    jax.tree.map(np.testing.assert_array_equal, one.network.params, other.network.params)


def test_a_folder_without_a_run_is_told(tiny_job: list[str], tmp_path: Path) -> None:
    config = parse(tiny_job)
    with pytest.raises(InputError, match=f"{tmp_path}/none: no such folder; give the --workdir"):
        load_pretrained(tmp_path / "none", config)
    with pytest.raises(InputError, match=f"{tmp_path}: no checkpoint in this folder; give the"):
        load_pretrained(tmp_path, config)


def test_a_run_of_a_version_with_other_networks_is_told(
    source: Path, tiny_job: list[str], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    about = copy / "checkpoints/4/about/metadata"
    about.write_text(about.read_text("utf-8").replace('"width"', '"girth"'), "utf-8")
    write_seal(about.parents[1])
    with pytest.raises(InputError, match=r"copy/checkpoints/4: written by another .* option girth"):
        load_pretrained(copy, parse(tiny_job))


def network_of(channels: int, num_classes: int, seed: int) -> Network:
    """Returns a network of a few weights."""
    rng = np.random.default_rng(seed)
    shapes = {"stem": {"weight": (3, 3, 1, channels)}, "blocks": {0: {"scale": (channels,)}}}
    shapes["classifier"] = {"weight": (channels, num_classes), "bias": (num_classes,)}
    params = jax.tree.map(
        lambda shape: jnp.array(rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    statistics = {"blocks": {0: {"mean": jnp.array(rng.normal(size=channels), jnp.float32)}}}
    return Network(None, None, None, params, statistics, "", 0, 8)


def trained(tiny_job: list[str], network: Network, classes: str) -> Pretrained:
    return Pretrained(network, tuple(classes), parse(tiny_job), 7, {}, Path("runs/old/7"))


@pytest.mark.parametrize("classes", ["阿啊哀", "啊哀埃", "埃挨哎唉", "阿哀"])
def test_each_character_keeps_its_weights(tiny_job: list[str], classes: str) -> None:
    """Permuted, partly or wholly new, and fewer."""
    known = "啊阿哀"
    old, fresh = network_of(6, len(known), 0), network_of(6, len(classes), 1)
    ours = start_from(fresh, tuple(classes), trained(tiny_job, old, known))
    for part in ("stem", "blocks"):
        jax.tree.map(np.testing.assert_array_equal, ours.params[part], old.params[part])
    jax.tree.map(np.testing.assert_array_equal, ours.batch_stats, old.batch_stats)
    for name, leaf in ours.params["classifier"].items():
        assert leaf.shape == fresh.params["classifier"][name].shape
        for place, character in enumerate(classes):
            origin, index = (old, known.index(character)) if character in known else (fresh, place)
            expected = origin.params["classifier"][name][..., index]
            np.testing.assert_array_equal(leaf[..., place], expected, err_msg=character)


def test_all_level1_characters_onto_a_few(tiny_job: list[str]) -> None:
    known, few = "".join(level1()), "座A阿啊"  # the last, none, the second and the first
    old, fresh = network_of(6, len(known), 0), network_of(6, len(few), 1)
    pretrained = trained(tiny_job, old, known)
    ours = start_from(fresh, tuple(few), pretrained).params["classifier"]
    for name, leaf in ours.items():
        rows = old.params["classifier"][name][..., jnp.array([3754, 1, 0])]
        np.testing.assert_array_equal(leaf[..., jnp.array([0, 2, 3])], rows)
        np.testing.assert_array_equal(leaf[..., 1], fresh.params["classifier"][name][..., 1])
    assert describe_start(few, pretrained, pretrained.config) == (
        "starting from runs/old/7: of the last layer 3 characters are kept, 1 are new, 3,752 are "
        "left out"
    )
    other = parse(tiny_job, "--config.data.aspect=adaptive")
    warning = "warning: it was trained with data.aspect='keep', and not 'adaptive'"
    assert describe_start(few, pretrained, other).splitlines()[1] == warning


def test_another_architecture_is_refused(tiny_job: list[str]) -> None:
    fresh, wider = network_of(6, 3, 0), network_of(8, 3, 0)
    deeper = dataclasses.replace(fresh, params=fresh.params | {"head": {"weight": jnp.ones(3)}})
    for other in (wider, deeper):
        with pytest.raises(InputError) as caught:
            start_from(fresh, tuple("啊阿哀"), trained(tiny_job, other, "啊阿哀"))
        assert str(caught.value) == (
            "runs/old/7: has other layers than the network to train: it is mobilenet_v1 of width "
            "0.1"
        )


def test_a_run_starts_where_another_ended(
    source: Path, tiny_job: list[str], tmp_path: Path
) -> None:
    moved, workdir = tmp_path / "source", tmp_path / "run"
    shutil.copytree(source, moved)
    still = ["--config.num_steps=1", "--config.optimizer.learning_rate=1e-12"]
    flags = [*tiny_job, *still, f"--config.init_from={moved}", f"--workdir={workdir}"]
    assert main.main(["main", *flags]) == 0
    (before,), (after,) = validated(source), validated(workdir)
    assert (after["eval/top1"], after["eval/top5"]) == (before["eval/top1"], before["eval/top5"])
    assert after["eval/loss"] == pytest.approx(before["eval/loss"], rel=1e-5)
    shutil.rmtree(moved)  # the run has its own checkpoint now
    assert main.main(["main", *flags]) == 0


@pytest.mark.parametrize("key", ["init_from", "teacher.checkpoint"])
def test_a_wrong_source_is_told_in_one_line(
    key: str,
    source: Path,
    tiny_job: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert source.exists(), "so the data are prepared and nothing shows a progress bar"
    none = tmp_path / "none"
    wrong = {none: f"config.{key}={none}: no such folder; give the --workdir of a run, or its"}
    flags = [*tiny_job, f"--workdir={tmp_path / 'run'}"]
    if key == "init_from":
        flags += ["--config.model.width=0.2"]
        wrong[source] = "has other layers than the network to train: it is mobilenet_v1 of width"
    for path, message in wrong.items():
        assert main.main(["main", *flags, f"--config.{key}={path}"]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.count("\n") == 1
        assert message in printed.err
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_must_see_the_same_images_and_mean_the_same_classes(
    source: Path, tiny_job: list[str]
) -> None:
    config = parse(tiny_job, f"--config.teacher.checkpoint={source}")
    train = load(config, "train")
    teacher, form = _load_teacher(config, train)
    assert form.data == config.data
    jax.tree.map(
        np.testing.assert_array_equal,
        teacher.params,
        load_pretrained(source, config).network.params,
    )
    others = dataclasses.replace(train, classes=train.classes[::-1])
    with pytest.raises(InputError, match="trained on another class list"):
        _load_teacher(config, others)
    for key, value, own in (
        ("image_px", 64, 32), ("margin_px", 3, 2), ("aspect", "adaptive", "keep")
    ):  # fmt: skip
        changed = parse(tiny_job, f"--config.teacher.checkpoint={source}")
        changed.data[key] = value
        with pytest.raises(InputError) as caught:
            _load_teacher(changed, train)
        assert str(caught.value) == (
            f"{source / 'checkpoints' / '4'}: a teacher trained with data.{key}={own!r} cannot "
            f"judge images of data.{key}={value!r}; with --config.teacher.precompute=True its "
            f"logits are computed from its own"
        )


def test_a_run_learns_from_its_teacher(source: Path, tiny_job: list[str]) -> None:
    teacher_config = {"checkpoint": source, "weight": 0.25, "temperature": 3.0}
    job = create_training_setup(
        parse(
            tiny_job, *(f"--config.teacher.{key}={value}" for key, value in teacher_config.items())
        ),
        Timeline(),
    )
    teacher = load_pretrained(source, job.config).network
    ((params, batch_stats, _),) = job.teacher_variables
    jax.tree.map(np.testing.assert_array_equal, params, teacher.params)
    jax.tree.map(np.testing.assert_array_equal, batch_stats, teacher.batch_stats)

    chunk = next(job.batches.chunks(0, [1]))
    images, labels = map(np.asarray, job.batches.get_batch(chunk.arrays, 0))
    augment_keys, dropout_keys = (
        row_keys(0, stream, jnp.int32(0), len(labels)) for stream in (AUGMENT, DROPOUT)
    )
    inputs = jax.jit(job.augment)(augment_keys, to_float(jnp.array(images)))[..., None]
    network = job.network
    teacher_logits, _ = jax.jit(teacher.apply)(params, batch_stats, inputs)
    logits, _ = jax.jit(
        lambda x: network.apply(network.params, network.batch_stats, x, True, dropout_keys)
    )(inputs)
    teacher_logits, logits = (np.asarray(x, np.float64) for x in (teacher_logits, logits))
    by_label = -log_softmax(logits, axis=1)[np.arange(len(labels)), labels]
    away = 9.0 * entropy(softmax(teacher_logits / 3, axis=1), softmax(logits / 3, axis=1), axis=1)
    assert away.mean() > 1e-3
    _, sums = job.train_chunk(job.initial, np.int32(1), chunk.arrays, *job.teacher_variables)
    np.testing.assert_allclose(sums["loss"], np.mean(0.75 * by_label + 0.25 * away), rtol=1e-4)


def test_precomputed_teacher_logits_are_of_the_teachers_own_normal_form(
    source: Path, tiny_job: list[str]
) -> None:
    flags = [f"--config.teacher.checkpoint={source}", "--config.teacher.precompute=True"]
    own = create_training_setup(parse(tiny_job, *flags), Timeline()).train
    flags += ["--config.data.image_px=48", "--config.data.aspect=adaptive"]
    train = create_training_setup(parse(tiny_job, *flags), Timeline()).train
    assert (own.images.shape[1:], train.images.shape[1:]) == ((32, 32), (48, 48))
    np.testing.assert_array_equal(train.labels, own.labels)
    np.testing.assert_array_equal(train.teacher_logits, own.teacher_logits)


@pytest.mark.parametrize("placement", [pytest.param("stream", marks=pytest.mark.slow), "device"])
def test_precomputed_teacher_logits_are_of_the_images_as_they_are(
    source: Path, tiny_job: list[str], placement: str
) -> None:
    teacher_config = {"checkpoint": source, "precompute": True, "weight": 1.0, "temperature": 3.0}
    flags = [f"--config.teacher.{key}={value}" for key, value in teacher_config.items()]
    flags.append(f"--config.data.placement={placement}")
    job = create_training_setup(parse(tiny_job, *flags), Timeline())
    assert job.teacher_variables == ()

    chunk = next(job.batches.chunks(0, [1]))
    images, labels, _ = map(np.asarray, job.batches.get_batch(chunk.arrays, 0))
    teacher = load_pretrained(source, job.config).network
    seen = to_float(jnp.array(images))[..., None]
    teacher_logits, _ = jax.jit(teacher.apply)(teacher.params, teacher.batch_stats, seen)
    augment_keys, dropout_keys = (
        row_keys(0, stream, jnp.int32(0), len(labels)) for stream in (AUGMENT, DROPOUT)
    )
    inputs = jax.jit(job.augment)(augment_keys, to_float(jnp.array(images)))[..., None]
    network = job.network
    logits, _ = jax.jit(
        lambda x: network.apply(network.params, network.batch_stats, x, True, dropout_keys)
    )(inputs)
    teacher_logits, logits = (np.asarray(x, np.float64) / 3 for x in (teacher_logits, logits))
    away = 9.0 * entropy(softmax(teacher_logits, axis=1), softmax(logits, axis=1), axis=1)
    _, sums = job.train_chunk(job.initial, np.int32(1), chunk.arrays)
    np.testing.assert_allclose(sums["loss"], away.mean(), rtol=2e-3)  # logits of half precision
