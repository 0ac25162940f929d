"""Schedules against formulas, optimisers against their published updates, all in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hccr_jax.config import RULES
from hccr_jax.models.packing import pack
from hccr_jax.train.optim import MUON_RMS, make_optimizer, make_schedule


def rates(schedule, steps: np.ndarray) -> np.ndarray:
    """The schedule as a run uses it: under jit, of an int32 step."""
    with jax.numpy_dtype_promotion("standard"):
        return np.asarray(jax.jit(jax.vmap(schedule))(jnp.array(steps, jnp.int32)), np.float64)


def test_the_papers_learning_rate():
    schedule = make_schedule(
        "exponential", 1e-3, total_steps=160_000, decay_rate=0.94, decay_steps=8767, staircase=True
    )
    ours = rates(schedule, np.array([0, 8766, 8767, 17_533, 17_534, 160_000]))
    exact = 1e-3 * 0.94 ** np.array([0, 0, 1, 1, 2, 18])
    np.testing.assert_allclose(ours, exact, rtol=2e-6)
    assert ours[-1] == pytest.approx(3.28e-4, abs=5e-7)


@pytest.mark.parametrize("staircase", [True, False])
def test_exponential_is_its_formula(staircase):
    steps = np.arange(100)
    schedule = make_schedule(
        "exponential", 0.2, total_steps=100, decay_rate=0.5, decay_steps=7, staircase=staircase
    )
    exponents = steps // 7 if staircase else steps / 7
    np.testing.assert_allclose(rates(schedule, steps), 0.2 * 0.5**exponents, rtol=2e-6)


def test_cosine_is_half_a_wave_after_the_warmup():
    steps = np.arange(140)
    schedule = make_schedule(
        "cosine", 0.3, total_steps=120, warmup_steps=20, end_learning_rate=0.01
    )
    progress = np.clip((steps - 20) / 100, 0, 1)
    exact = 0.01 + (0.3 - 0.01) * (1 + np.cos(np.pi * progress)) / 2
    first = 0.3 / 20
    exact[:20] = first + (0.3 - first) * steps[:20] / 20
    np.testing.assert_allclose(rates(schedule, steps), exact, rtol=1e-5)


def test_constant_is_constant():
    schedule = make_schedule("constant", 0.3, total_steps=10)
    np.testing.assert_array_equal(rates(schedule, np.arange(20)), np.float32(0.3))


@pytest.mark.parametrize("name", RULES["optimizer.schedule"].words)
def test_warmup_rises_from_its_first_step_to_the_peak(name):
    schedule = make_schedule(name, 1e-3, total_steps=50, warmup_steps=10, decay_steps=5)
    ours = rates(schedule, np.arange(11))
    assert ours[0] == pytest.approx(1e-4)
    assert ours[10] == pytest.approx(1e-3)
    np.testing.assert_allclose(np.diff(ours), (1e-3 - 1e-4) / 10, rtol=1e-4)


def test_every_name_is_a_schedule_of_its_own():
    names = RULES["optimizer.schedule"].words
    options = {"total_steps": 10, "decay_rate": 0.5, "decay_steps": 1}
    values = {name: float(make_schedule(name, 1.0, **options)(5)) for name in names}
    assert len(set(values.values())) == len(names), values


@pytest.mark.parametrize(("decay_steps", "total_steps"), [(0, 10), (-3, 10), (1, 0)])
def test_schedules_that_could_only_be_a_mistake_are_refused(decay_steps, total_steps):
    with pytest.raises(ValueError, match=f"decay_steps={decay_steps}"):
        make_schedule("exponential", 1e-3, total_steps=total_steps, decay_steps=decay_steps)


def some_params() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"weight": (4, 3), "depthwise": (3, 3, 2), "bias": (5,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def some_gradients(count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [
        {name: rng.normal(size=leaf.shape).astype(np.float32) for name, leaf in params.items()}
        for params in [some_params()] * count
    ]


def optimize(optimizer, gradients) -> dict[str, np.ndarray]:
    """Applies some updates as the training step does."""

    @jax.jit
    def step(params, state, gradient):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradient, state, params)
            return jax.tree.map(jnp.add, params, updates), state

    params = pack(some_params())
    state = optimizer.init(params)
    for gradient in gradients:
        params, state = step(params, state, pack(gradient))
    return params.unpack()


def assert_near(ours: dict, exact: dict) -> None:
    assert ours.keys() == exact.keys()
    for name, values in exact.items():
        np.testing.assert_allclose(ours[name], values, rtol=2e-6, atol=2e-6, err_msg=name)


def halving(step):
    return 0.1 * 0.5**step


def adam(param, gradients, weight_decay=0.0, beta1=0.9, beta2=0.999, epsilon=1e-8):
    """Algorithm 1 of https://arxiv.org/abs/1412.6980 and, decoupled, of 1711.05101."""
    param, m, v = param.astype(np.float64), 0.0, 0.0
    for t, gradient in enumerate(gradients, start=1):
        gradient = gradient.astype(np.float64)
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * gradient**2
        update = m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + epsilon)
        param = param - halving(t - 1) * (update + weight_decay * param)
    return param


def test_adam_is_its_algorithm():
    gradients = some_gradients(4)
    exact = {
        name: adam(value, [gradient[name] for gradient in gradients])
        for name, value in some_params().items()
    }
    assert_near(optimize(make_optimizer("adam", halving), gradients), exact)


def test_adamw_decays_weights_and_spares_vectors():
    gradients = some_gradients(4)
    decays = {"weight": 0.2, "depthwise": 0.2, "bias": 0.0}
    exact = {
        name: adam(value, [gradient[name] for gradient in gradients], decays[name], beta2=0.95)
        for name, value in some_params().items()
    }
    optimizer = make_optimizer("adamw", halving, beta2=0.95, weight_decay=0.2)
    assert_near(optimize(optimizer, gradients), exact)


@pytest.mark.parametrize("shape", [(1, 1, 6, 24), (3, 3, 2, 5), (1, 1, 20, 4)])
def test_muon_changes_a_convolution_by_the_nearest_orthogonal_matrix(shape):
    rng = np.random.default_rng(2)
    # The first gradient is all of the momentum there is.
    filters, gradient = rng.normal(size=(2, *shape)).astype(np.float32)
    optimizer = make_optimizer("muon", lambda step: 0.1, weight_decay=0.2)
    params = pack({"conv": filters})
    with jax.numpy_dtype_promotion("standard"):
        update = optimizer.update(pack({"conv": gradient}), optimizer.init(params), params)[0]
    update = update.unpack()["conv"]
    rows, columns = filters.size // shape[3], shape[3]
    change = (np.asarray(update) + 0.1 * 0.2 * filters).reshape(rows, columns)
    left, _, right = np.linalg.svd(gradient.reshape(rows, columns), full_matrices=False)
    turned = left.T @ change @ right.T / (-0.1 * MUON_RMS * np.sqrt(max(rows, columns)))
    # The same singular vectors; five steps of Newton and Schulz leave values of 0.7 to 1.2.
    np.testing.assert_allclose(np.diag(turned), 0.95, atol=0.35)
    np.testing.assert_allclose(turned, np.diag(np.diag(turned)), atol=1e-4)


def test_every_name_is_an_optimizer_of_its_own():
    params = pack({"conv": np.random.default_rng(3).normal(size=(1, 1, 3, 4))})
    updates = {}
    for name in RULES["optimizer.name"].words:
        optimizer = make_optimizer(name, lambda step: 0.1, weight_decay=0.2)
        with jax.numpy_dtype_promotion("standard"):
            update = optimizer.update(params, optimizer.init(params), params)[0]
        updates[name] = np.asarray(update.vector).round(4).tobytes()
    assert len(set(updates.values())) == len(updates) == 4


def test_muon_leaves_all_but_convolutions_to_adamw():
    gradients = some_gradients(4)
    exact = optimize(make_optimizer("adamw", halving, weight_decay=0.2), gradients)
    assert_near(optimize(make_optimizer("muon", halving, weight_decay=0.2), gradients), exact)


def test_sgd_is_nesterovs_momentum_with_decay():
    gradients = some_gradients(4)

    def nesterov(param, gradients, weight_decay):
        param, velocity = param.astype(np.float64), 0.0
        for t, gradient in enumerate(gradients):
            gradient = gradient + weight_decay * param
            velocity = 0.8 * velocity + gradient
            param = param - halving(t) * (gradient + 0.8 * velocity)
        return param

    exact = {
        name: nesterov(value, [g[name] for g in gradients], 0.0 if name == "bias" else 0.2)
        for name, value in some_params().items()
    }
    optimizer = make_optimizer("sgd", halving, beta1=0.8, weight_decay=0.2)
    assert_near(optimize(optimizer, gradients), exact)


@pytest.mark.parametrize("clip_norm", [0.5, 100.0])
def test_clipping_shortens_only_gradients_that_are_too_long(clip_norm):
    gradient = some_gradients(1)[0]
    norm = np.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for leaf in gradient.values()))
    assert 0.5 < norm < 100
    factor = min(1.0, clip_norm / norm)
    exact = {name: value - 0.1 * factor * gradient[name] for name, value in some_params().items()}
    optimizer = make_optimizer("sgd", lambda step: 0.1, beta1=0.0, clip_norm=clip_norm)
    assert_near(optimize(optimizer, [gradient]), exact)
