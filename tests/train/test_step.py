"""The step functions: statistics, gradients and metrics, on one device and on four."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh
from scipy.special import log_softmax, softmax
from scipy.stats import entropy

from hccr_jax.configs import default
from hccr_jax.inference.steps import to_float
from hccr_jax.models.blocks import InvertedResidual
from hccr_jax.models.functional import split_model
from hccr_jax.models.layers import Classifier, ConvNorm
from hccr_jax.models.packing import pack
from hccr_jax.models.registry import create_model
from hccr_jax.ops.cross_entropy import cross_entropy
from hccr_jax.runtime.rng import AUGMENT, DROPOUT, row_keys
from hccr_jax.runtime.sharding import DATA_AXIS, replicated
from hccr_jax.train.augment import make_augment
from hccr_jax.train.optim import make_optimizer
from hccr_jax.train.setup import augment_options
from hccr_jax.train.state import TrainState, average_statistics, create_train_state
from hccr_jax.train.statistics_step import make_statistics_step
from hccr_jax.train.step import NEVER, StepOptions, make_train_chunk, make_train_step

NUM_CLASSES, IMAGE_PX = 7, 12


class SmallNetwork(nnx.Module):
    """Layers of every kind: a whole network takes far longer to compile."""

    def __init__(self, dropout_rate: float, rngs: nnx.Rngs) -> None:
        common = {"epsilon": 1e-3, "dtype": jnp.float32, "rngs": rngs}
        self.blocks = nnx.List(
            [ConvNorm(1, 16, 3, 2, **common), InvertedResidual(16, 16, 1, 2, **common)]
        )
        self.classifier = Classifier(16, NUM_CLASSES, dropout_rate, rngs=rngs)

    def __call__(self, images, train=False, dropout_keys=None, axis_name=None):
        x = images
        for block in self.blocks:
            x = block(x, train, axis_name)
        return self.classifier(x, train, dropout_keys)


def make_small_network(dropout_rate: float = 0.0, seed: int = 0):
    return split_model(SmallNetwork(dropout_rate, nnx.Rngs(seed)))


def mesh_of(count: int) -> Mesh:
    devices = jax.devices()[:count]
    return jax.make_mesh((count,), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def make_batch(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (rows, IMAGE_PX, IMAGE_PX), np.uint8)
    return images, rng.integers(0, NUM_CLASSES, rows).astype(np.int32)


def fresh(
    params, batch_stats, optimizer, mesh: Mesh, averages: bool = False, seed: int = 0
) -> TrainState:
    """A state of its own, for the step gives up the one it gets, placed as the step leaves it."""
    copies = jax.tree.map(jnp.copy, (params, batch_stats))
    return jax.device_put(create_train_state(*copies, optimizer, averages, seed), replicated(mesh))


def assert_near(ours, expected, atol: float = 1e-5) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol), ours, expected
    )


def test_the_first_average_is_the_first_batch():
    batch = jnp.array([1e-7, 3.3, 1e7])
    averages = average_statistics(jnp.array([1.0, 1.0, 1.0]), batch, jnp.array(0), 0.9997)
    np.testing.assert_array_equal(averages, batch)


def test_averages_of_a_constant_stay_exact():
    constant = jnp.array(np.random.default_rng(0).normal(size=1000) * 1e3, jnp.float32)
    average = jax.jit(functools.partial(average_statistics, momentum=0.9997))
    for step in [0, 1, 2, 3, 77, 4321, 29_991, 30_000, 160_000, 2**31 - 1]:
        averages = average(constant, constant, jnp.array(step))
        np.testing.assert_array_equal(averages, constant)


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.9997])
def test_averages_follow_their_recursion(momentum):
    batches = np.random.default_rng(0).normal(5, 1, (200, 3)).astype(np.float32)
    average = jax.jit(functools.partial(average_statistics, momentum=momentum))
    ours, exact = {"mean": jnp.zeros(3)}, np.zeros(3)
    for step, batch in enumerate(batches):
        ours = average(ours, {"mean": batch}, jnp.array(step))
        keep = min(momentum, step / (step + 9))
        exact = keep * exact + (1 - keep) * batch
    np.testing.assert_allclose(ours["mean"], exact, rtol=1e-6)


def test_a_plain_average_gives_the_past_the_same_weight_from_the_start():
    batches = np.random.default_rng(0).normal(5, 1, (50, 3)).astype(np.float32)
    average = jax.jit(functools.partial(average_statistics, momentum=0.9, ramp=False))
    ours = jnp.ones(3)
    for step, batch in enumerate(batches):
        ours = average(ours, jnp.array(batch), jnp.array(step))
    weights = 0.1 * 0.9 ** np.arange(49, -1, -1)
    np.testing.assert_allclose(ours, 0.9**50 + weights @ batches, rtol=1e-5)


def test_every_row_step_and_stream_has_a_key_of_its_own():
    keys = [
        jax.random.key_data(row_keys(seed, stream, jnp.array(step), 5))
        for seed in (0, 1) for stream in (AUGMENT, DROPOUT) for step in (0, 1)
    ]  # fmt: skip
    assert len(np.unique(np.concatenate(keys), axis=0)) == 2 * 2 * 2 * 5
    more = jax.random.key_data(row_keys(0, AUGMENT, jnp.array(0), 9))
    np.testing.assert_array_equal(more[:5], keys[0])  # a larger batch leaves its first rows alone


def as_they_are(keys: jax.Array, images: jax.Array) -> jax.Array:
    return images


@pytest.fixture(scope="module")
def descent():
    """Returns a network, plain gradient descent at rate 0.5, and its step on four devices."""
    network = make_small_network()
    optimizer = make_optimizer("sgd", lambda step: 0.5, beta1=0.0)
    options = StepOptions(label_smoothing=0.1, noise_rate=0.2)
    step = make_train_step(network[0], optimizer, as_they_are, mesh_of(4), options)
    return network, optimizer, step


def test_a_step_descends_the_gradient_of_the_mean_loss(descent):
    images, labels = make_batch(16)
    (apply, params, batch_stats), optimizer, step = descent

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def plain(params):
        logits, statistics = apply(params, batch_stats, to_float(images)[..., None], True)
        return cross_entropy(logits, jnp.array(labels), 0.1, 0.2).mean(), (logits, statistics)

    (loss, (logits, statistics)), gradients = plain(params)
    state, metrics = step(fresh(params, batch_stats, optimizer, mesh_of(4)), images, labels)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(gradients)))
    accuracy = (np.argmax(logits, 1) == labels).mean()
    assert (metrics.pop("skipped"), metrics.pop("first_bad")) == (0.0, NEVER)
    assert_near(metrics, {"loss": loss, "accuracy": accuracy, "gradient_norm": norm})
    assert_near(state.params.unpack(), jax.tree.map(lambda p, g: p - 0.5 * g, params, gradients))
    assert_near(state.batch_stats.unpack(), statistics)
    assert state.step == 1


def test_steps_are_pure_and_do_not_depend_on_the_number_of_devices():
    images, labels = make_batch(16)
    apply, params, batch_stats = make_small_network(dropout_rate=0.5)
    optimizer = make_optimizer("sgd", lambda step: 0.1, beta1=0.9)

    def two_steps(devices):
        state = fresh(params, batch_stats, optimizer, mesh_of(devices))
        state, first = steps[devices](state, images, labels)
        state, second = steps[devices](state, images, labels)
        return state, (first, second)

    steps = {
        count: make_train_step(apply, optimizer, as_they_are, mesh_of(count)) for count in (1, 4)
    }
    once, again, on_four = two_steps(1), two_steps(1), two_steps(4)
    jax.tree.map(np.testing.assert_array_equal, once, again)
    jax.tree.map(np.testing.assert_array_equal, on_four, two_steps(4))
    assert_near(on_four, once)


@pytest.mark.parametrize("devices", [1, 4])
def test_augmentation_and_dropout_draw_with_their_rows_keys_of_this_step(devices):
    def draw(keys):
        return jax.vmap(jax.random.uniform)(keys)

    def noise(keys, images):
        return jnp.zeros_like(images) + draw(keys)[:, None, None]

    def network(params, batch_stats, images, train, dropout_keys, axis_name, packed):
        statistics = {"augment": images[:, 0, 0, 0], "dropout": draw(dropout_keys)}
        statistics = jax.lax.all_gather(statistics, axis_name, tiled=True)
        return jnp.zeros((len(images), NUM_CLASSES)) + params[None], statistics

    images, labels = make_batch(8)
    optimizer = make_optimizer("sgd", lambda step: 0.0)
    options = StepOptions(batch_norm_momentum=0.0)
    step = make_train_step(network, optimizer, noise, mesh_of(devices), options)
    nothing = {"augment": jnp.zeros(8), "dropout": jnp.zeros(8)}
    state = fresh(jnp.zeros(NUM_CLASSES), nothing, optimizer, mesh_of(devices), seed=3)
    for count in range(2):
        state, _ = step(state, images, labels)
        for name, stream in (("augment", AUGMENT), ("dropout", DROPOUT)):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), stream), count)
            expected = [float(jax.random.uniform(jax.random.fold_in(key, row))) for row in range(8)]
            statistics = state.batch_stats.unpack()
            np.testing.assert_allclose(statistics[name], expected, rtol=1e-6)


def test_another_seed_is_the_same_program():
    def text(seed):
        network, optimizer = (
            make_small_network(dropout_rate=0.5),
            make_optimizer("sgd", lambda step: 0.1),
        )
        config = default.get_config()
        config.augment.rotate_deg = 10.0
        augment = make_augment(augment_options(config))
        step = make_train_step(network[0], optimizer, augment, mesh_of(1))
        state = fresh(*network[1:], optimizer, mesh_of(1), seed=seed)
        return step.lower(state, *make_batch(8)).as_text()

    assert text(0) == text(7)


def mean_of_microbatches(network, microbatches):
    """Returns the mean loss, statistics and gradients of microbatches, each computed alone."""
    apply, params, batch_stats = network

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def plain(params, images, labels):
        logits, statistics = apply(params, batch_stats, to_float(images)[..., None], True)
        return cross_entropy(logits, labels).mean(), statistics

    each = [plain(params, *microbatch) for microbatch in microbatches]
    return jax.tree.map(lambda *leaves: np.mean(leaves, 0), *each)


@pytest.mark.parametrize("devices", [1, 2])
def test_accumulation_averages_the_gradients_of_its_microbatches(devices):
    images, labels = make_batch(16)
    network = apply, params, batch_stats = make_small_network()
    # Microbatch m of four is every fourth row from row m on, however many devices share it.
    microbatches = [(images[m::4], labels[m::4]) for m in range(4)]
    (loss, statistics), gradients = mean_of_microbatches(network, microbatches)
    optimizer = make_optimizer("sgd", lambda step: 0.5, beta1=0.0)
    options = StepOptions(accumulation_steps=4)
    step = make_train_step(apply, optimizer, as_they_are, mesh_of(devices), options)
    state, metrics = step(fresh(params, batch_stats, optimizer, mesh_of(devices)), images, labels)
    assert_near(metrics["loss"], loss)
    assert_near(state.params.unpack(), jax.tree.map(lambda p, g: p - 0.5 * g, params, gradients))
    assert_near(state.batch_stats.unpack(), statistics)


@pytest.mark.parametrize("options", [{"strict_shards": 4}, {"global_batch_norm": False}])
def test_microbatches_with_statistics_of_their_own_are_averaged(options):
    """Four of consecutive rows: of a strict step, or those that four devices hold."""
    images, labels = make_batch(16)
    network = apply, params, batch_stats = make_small_network()
    microbatches = [(images[i : i + 4], labels[i : i + 4]) for i in range(0, 16, 4)]
    (loss, statistics), gradients = mean_of_microbatches(network, microbatches)
    optimizer = make_optimizer("sgd", lambda step: 0.5, beta1=0.0)
    step = make_train_step(apply, optimizer, as_they_are, mesh_of(4), StepOptions(**options))
    state, metrics = step(fresh(params, batch_stats, optimizer, mesh_of(4)), images, labels)
    assert_near(metrics["loss"], loss)
    assert_near(state.params.unpack(), jax.tree.map(lambda p, g: p - 0.5 * g, params, gradients))
    assert_near(state.batch_stats.unpack(), statistics)


def test_a_strict_step_has_the_same_bits_on_any_number_of_devices():
    images, labels = make_batch(32)
    apply, params, batch_stats = make_small_network(dropout_rate=0.5)
    optimizer = make_optimizer("adamw", lambda step: 0.01, weight_decay=0.1, clip_norm=1.0)

    def run(devices):
        mesh = mesh_of(devices)
        step = make_train_step(apply, optimizer, as_they_are, mesh, StepOptions(strict_shards=4))
        count = make_statistics_step(apply, as_they_are, mesh, strict_shards=4)
        state = fresh(params, batch_stats, optimizer, mesh)
        for _ in range(3):
            state, metrics = step(state, images, labels)
        return (
            state,
            metrics,
            count(
                state.params.unpack(), state.batch_stats.unpack(), images, jnp.int32(2), state.seed
            ),
        )

    alone = run(1)
    for devices in (2, 4):
        jax.tree.map(np.testing.assert_array_equal, run(devices), alone)


def test_gradients_added_up_in_bfloat16_have_its_precision():
    images, labels = make_batch(16)
    apply, params, batch_stats = make_small_network()
    optimizer = make_optimizer("sgd", lambda step: 1.0, beta1=0.0)
    gradients = []
    for dtype in (jnp.float32, jnp.bfloat16):
        options = StepOptions(reduce_dtype=dtype)
        step = make_train_step(apply, optimizer, as_they_are, mesh_of(4), options)
        state, _ = step(fresh(params, batch_stats, optimizer, mesh_of(4)), images, labels)
        gradients.append(pack(params).vector - state.params.vector)
    exact, rounded = gradients
    assert 0 < np.linalg.norm(rounded - exact) < 2**-7 * np.linalg.norm(exact)


def test_a_step_that_is_not_finite_changes_nothing_and_is_named(descent):
    (_, params, batch_stats), optimizer, step = descent
    images, labels = make_batch(16)
    bad = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.inf), params)
    before = fresh(bad, batch_stats, optimizer, mesh_of(4))
    state, metrics = step(before.replace(step=jnp.int32(7)), images, labels)
    assert state.step == 8
    jax.tree.map(
        np.testing.assert_array_equal,
        (state.params.unpack(), state.batch_stats.unpack()),
        (bad, batch_stats),
    )
    assert {name: float(value) for name, value in metrics.items()} == {
        "loss": 0, "accuracy": 0, "gradient_norm": 0, "skipped": 1, "first_bad": 7,
    }  # fmt: skip


def test_a_chunk_is_its_steps_in_turn_whatever_its_length(descent):
    """Bit for bit: a run that was stopped may go on in chunks of other lengths."""
    (_, params, batch_stats), optimizer, step = descent
    batches = [make_batch(16, seed) for seed in range(5)]
    arrays = tuple(np.stack(rows) for rows in zip(*batches, strict=True))
    train_chunk = make_train_chunk(
        step, lambda arrays, index: tuple(a[index] for a in arrays), max_steps=5
    )

    def run(lengths):
        state, sums, done = fresh(params, batch_stats, optimizer, mesh_of(4)), [], 0
        for count in lengths:
            later = tuple(np.roll(array, -done, axis=0) for array in arrays)
            state, metrics = train_chunk(state, np.int32(count), later)
            sums, done = [*sums, metrics], done + count
        return state, sums

    whole, (of_five,) = run([5])
    for lengths in ([1, 1, 1, 1, 1], [2, 3]):
        end, sums = run(lengths)
        jax.tree.map(np.testing.assert_array_equal, end, whole)
        assert {int(chunk.pop("first_bad")) for chunk in sums} == {NEVER}
        expected = {name: value for name, value in of_five.items() if name != "first_bad"}
        assert_near(jax.tree.map(lambda *leaves: np.sum(leaves, 0), *sums), expected)
    state = fresh(params, batch_stats, optimizer, mesh_of(4))
    for batch in batches:
        state, _ = step(state, *batch)
    assert_near(whole, state)
    assert whole.step == 5


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2"])
def test_no_convolution_stands_in_the_loop_on_a_cpu(name):
    """XLA's CPU convolutions are ten to a hundred times slower inside a loop."""
    apply, params, batch_stats = split_model(
        create_model(name, num_classes=3, width=0.25, rngs=nnx.Rngs(0))
    )
    optimizer = make_optimizer("adam", lambda step: 0.1)
    step = make_train_step(apply, optimizer, as_they_are, mesh_of(1))
    state = jax.eval_shape(lambda: create_train_state(params, batch_stats, optimizer))
    images = jax.ShapeDtypeStruct((2, 4, 32, 32), np.uint8)
    labels = jax.ShapeDtypeStruct((2, 4), np.int32)
    train_chunk = make_train_chunk(step, lambda arrays, k: tuple(a[k] for a in arrays), max_steps=2)
    program = train_chunk.lower(state, np.int32(1), (images, labels)).as_text()
    assert "while" in program
    assert "convolution" not in program


AVERAGE_DECAY, TEACHER_WEIGHT, TEMPERATURE = 0.3, 0.7, 2.0


@pytest.fixture(scope="module")
def distilled():
    """Returns student, teacher, optimizer, and the step with an average, by number of devices."""
    student, (teach, *teacher) = make_small_network(), make_small_network(seed=1)
    teacher = jax.tree.map(lambda leaf: 3 * leaf, teacher)  # so that it has firm opinions
    optimizer = make_optimizer("sgd", lambda step: 0.5, beta1=0.0)
    options = StepOptions(
        label_smoothing=0.1, average_decay=AVERAGE_DECAY, teacher=teach,
        teacher_weight=TEACHER_WEIGHT, teacher_temperature=TEMPERATURE,
    )  # fmt: skip
    steps = {
        count: make_train_step(student[0], optimizer, as_they_are, mesh_of(count), options)
        for count in (1, 4)
    }
    return student, (teach, *teacher), optimizer, steps


def test_a_step_descends_the_gradient_of_labels_and_teacher(distilled):
    images, labels = make_batch(16)
    (apply, params, batch_stats), (teach, *teacher), optimizer, steps = distilled
    inputs = to_float(images)[..., None]
    logits, pull = jax.vjp(
        jax.jit(lambda params: apply(params, batch_stats, inputs, True)[0]), params
    )
    exact = np.asarray(logits, np.float64)
    taught = np.asarray(jax.jit(teach)(*teacher, inputs)[0], np.float64)
    target = 0.9 * np.eye(NUM_CLASSES)[labels] + 0.1 / NUM_CLASSES
    softened, softened_teacher = (softmax(x / TEMPERATURE, axis=1) for x in (exact, taught))
    away = TEMPERATURE**2 * entropy(softened_teacher, softened, axis=1)
    assert away.mean() > 0.1, "the teacher has something to say"
    by_label = -(target * log_softmax(exact, axis=1)).sum(1)
    loss = np.mean((1 - TEACHER_WEIGHT) * by_label + TEACHER_WEIGHT * away)
    by_logit = (1 - TEACHER_WEIGHT) * (softmax(exact, axis=1) - target)
    by_logit += TEACHER_WEIGHT * TEMPERATURE * (softened - softened_teacher)
    (gradients,) = pull(jnp.array(by_logit / len(labels), jnp.float32))

    state = fresh(params, batch_stats, optimizer, mesh_of(4), averages=True)
    state, metrics = steps[4](state, images, labels, tuple(teacher))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], (exact.argmax(1) == labels).mean())
    assert_near(state.params.unpack(), jax.tree.map(lambda p, g: p - 0.5 * g, params, gradients))


def test_the_average_of_the_weights_follows_its_recursion(distilled):
    images, labels = make_batch(16)
    (_, params, batch_stats), (_, *teacher), optimizer, steps = distilled
    state = fresh(params, batch_stats, optimizer, mesh_of(1), averages=True)
    exact = np.asarray(pack(params).vector, np.float64)
    for t in range(6):
        state, _ = steps[1](state, images, labels, tuple(teacher))
        keep = min(AVERAGE_DECAY, (t + 1) / (t + 10))  # the latter in the first three steps
        exact = keep * exact + (1 - keep) * np.asarray(state.params.vector, np.float64)
        np.testing.assert_allclose(state.average_params.vector, exact, atol=1e-6)
    assert state.eval_params is state.average_params
    plain = fresh(params, batch_stats, optimizer, mesh_of(1))
    assert plain.average_params is None
    assert plain.eval_params is plain.params


def test_average_and_teacher_do_not_depend_on_the_number_of_devices(distilled):
    images, labels = make_batch(16)
    (_, params, batch_stats), (_, *teacher), optimizer, steps = distilled
    ends = []
    for count, step in steps.items():
        state = fresh(params, batch_stats, optimizer, mesh_of(count), averages=True)
        for _ in range(2):
            state, metrics = step(state, images, labels, tuple(teacher))
        ends.append((state, metrics))
    assert_near(*ends)


def test_a_teacher_without_weight_changes_nothing(descent, distilled):
    images, labels = make_batch(16)
    (apply, params, batch_stats), optimizer, step = descent
    _, (teach, *teacher), _, _ = distilled
    options = StepOptions(label_smoothing=0.1, noise_rate=0.2, teacher=teach, teacher_weight=0.0)
    ignoring = make_train_step(apply, optimizer, as_they_are, mesh_of(4), options)
    alone = step(fresh(params, batch_stats, optimizer, mesh_of(4)), images, labels)
    state = fresh(params, batch_stats, optimizer, mesh_of(4))
    assert_near(ignoring(state, images, labels, tuple(teacher)), alone)  # two programs: they round


def test_a_chunk_passes_the_teacher_to_each_of_its_steps(distilled):
    (_, params, batch_stats), (_, *teacher), optimizer, steps = distilled
    batches = [make_batch(16, seed) for seed in range(2)]
    arrays = tuple(np.stack(rows) for rows in zip(*batches, strict=True))
    train_chunk = make_train_chunk(
        steps[1], lambda arrays, index: tuple(a[index] for a in arrays), max_steps=2
    )
    state = fresh(params, batch_stats, optimizer, mesh_of(1), averages=True)
    whole, sums = train_chunk(state, np.int32(2), arrays, tuple(teacher))
    state, losses = fresh(params, batch_stats, optimizer, mesh_of(1), averages=True), []
    for batch in batches:
        state, metrics = steps[1](state, *batch, tuple(teacher))
        losses.append(metrics["loss"])
    assert_near(whole, state)
    np.testing.assert_allclose(sums["loss"], np.sum(losses), rtol=1e-5)


def test_the_loss_falls_on_a_fixed_batch(descent):
    images, labels = make_batch(16)
    (_, params, batch_stats), optimizer, step = descent
    state, losses = fresh(params, batch_stats, optimizer, mesh_of(4)), []
    for _ in range(20):
        state, metrics = step(state, images, labels)
        losses.append(float(metrics["loss"]))
    assert losses[0] > 0.7 * np.log(NUM_CLASSES)
    assert losses[-1] < 0.5 * losses[0]
    assert state.step == 20


def test_the_statistics_step_averages_batches_equally():
    apply, params, batch_stats = make_small_network()
    step = make_statistics_step(apply, as_they_are, mesh_of(4))
    of_batch = jax.jit(lambda x: apply(params, batch_stats, to_float(x)[..., None], True)[1])
    averages, separate = batch_stats, []
    for count in range(3):
        images, _ = make_batch(8, seed=count)
        averages = step(params, averages, images // (count + 1), jnp.array(count), jnp.uint32(0))
        separate.append(of_batch(images // (count + 1)))
    assert_near(averages, jax.tree.map(lambda *leaves: np.mean(leaves, 0), *separate))


def linear_network(num_classes: int):
    """Returns a network of one matrix, and its weights: NumPy can compute its logits."""
    weight = np.random.default_rng(1).normal(size=(IMAGE_PX**2, num_classes)).astype(np.float32)

    def apply(weight, statistics, images, *training):
        return images.reshape(len(images), -1) @ weight, {}

    return apply, weight


@pytest.mark.parametrize("devices", [1, 4])
def test_images_of_a_uniform_target_are_taught_that_every_class_is_as_likely(devices):
    images, labels = make_batch(8)
    network, weight = linear_network(NUM_CLASSES)
    uniform = np.arange(8) % 3 == 0

    def is_uniform(keys):  # by the place of each key, found again on every device
        every = row_keys(3, AUGMENT, jnp.int32(0), 8)
        same = jax.random.key_data(keys)[:, None] == jax.random.key_data(every)[None]
        return (same.all(axis=-1) & jnp.array(uniform)[None]).any(axis=1)

    optimizer = make_optimizer("sgd", lambda step: 1.0)
    augment = make_augment(augment_options(default.get_config()))
    options = StepOptions(is_uniform=is_uniform)
    step = make_train_step(network, optimizer, augment, mesh_of(devices), options)
    state = create_train_state(jnp.array(weight), {}, optimizer, seed=3)
    _, metrics = step(state, images, labels)
    logits = np.asarray(to_float(images), np.float64).reshape(8, -1) @ weight.astype(np.float64)
    logs = log_softmax(logits, axis=1)
    losses = np.where(uniform, -logs.mean(axis=1), -logs[np.arange(8), labels])
    np.testing.assert_allclose(metrics["loss"], losses.mean(), rtol=1e-5)
    correct = np.where(uniform, np.exp(logs).max(axis=1) < 0.5, logs.argmax(axis=1) == labels)
    np.testing.assert_allclose(metrics["accuracy"], correct.mean(), rtol=1e-6)
