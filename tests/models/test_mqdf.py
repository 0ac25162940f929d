"""The classical recogniser against float64 references, SciPy, and the Gaussians it assumes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import scipy.stats
from flax import nnx

from hccr_jax import main
from hccr_jax.models import mqdf
from hccr_jax.models.costs import summarize
from hccr_jax.models.functional import count_parameters, split_model
from hccr_jax.models.gradient_features import (
    GRID,
    equalize_density,
    gradient_directions,
    gradient_features,
)
from hccr_jax.models.registry import create_model
from hccr_jax.train import fit_mqdf

ROOT = Path(__file__).parents[2]
CLASSES = 6


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def blobs(count: int, size: int) -> np.ndarray:
    """Returns smooth random images, float32 (count, size, size) in [0, 1]."""
    images = scipy.ndimage.gaussian_filter(noise(count, size, size), (0, 1.5, 1.5))
    return np.clip(3 * images, 0, 1).astype(np.float32)


def test_directions_add_up_to_the_sobel_gradient() -> None:
    images = blobs(3, 20)
    planes = np.asarray(gradient_directions(jnp.asarray(images)), np.float64)
    assert planes.min() >= 0
    assert (planes > 0).sum(axis=1).max() <= 2
    # Two neighbours: directions 0 and 7 count as such.
    pairs = (planes > 0) & (np.roll(planes, -1, axis=1) > 0)
    np.testing.assert_array_equal(pairs.sum(axis=1) == 1, (planes > 0).sum(axis=1) == 2)
    angles = np.arange(8) * math.pi / 4
    for axis, unit in ((2, np.cos(angles)), (1, np.sin(angles))):
        # Image by image: SciPy's filter also smooths along all other axes.
        sobel = np.stack(
            [scipy.ndimage.sobel(image, axis - 1, mode="constant") for image in images]
        )
        np.testing.assert_allclose(np.einsum("bkij,k->bij", planes, unit), sobel, atol=1e-5)


@pytest.mark.parametrize("size", [16, 40])
def test_features_agree_with_a_float64_reference(size: int) -> None:
    images = blobs(2, size)
    deviation = math.sqrt(2) * (size / GRID) / math.pi  # Liu et al., 2004
    expected = []
    for image in images.astype(np.float64):
        x, y = (scipy.ndimage.sobel(image, axis, mode="constant") for axis in (1, 0))
        angle, length = np.arctan2(y, x) % (2 * math.pi), np.hypot(x, y)
        sector = np.minimum(angle // (math.pi / 4), 7).astype(int)
        within = angle - sector * math.pi / 4
        planes = np.zeros((8, size, size))
        for k in range(8):
            # The sides of the parallelogram, by the law of sines.
            planes[k] += (sector == k) * length * np.sin(math.pi / 4 - within)
            planes[(k + 1) % 8] += (sector == k) * length * np.sin(within)
        samples = np.zeros((8, GRID, GRID))
        pixel = np.arange(size) + 0.5
        for i in range(GRID):
            for j in range(GRID):
                row, column = (i + 0.5) * size / GRID, (j + 0.5) * size / GRID
                squares = (pixel[:, None] - row) ** 2 + (pixel[None] - column) ** 2
                samples[:, i, j] = (planes * np.exp(-squares / (2 * deviation**2))).sum((1, 2))
        expected.append(np.sqrt(samples / samples.sum()).ravel())
    np.testing.assert_allclose(gradient_features(jnp.asarray(images)), expected, atol=2e-6)


def test_features_of_pale_ink_and_of_no_ink() -> None:
    images = jnp.asarray(blobs(2, 24))
    features = gradient_features(images)
    np.testing.assert_allclose((features**2).sum(1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(gradient_features(0.3 * images), features, atol=1e-6)
    np.testing.assert_array_equal(gradient_features(jnp.zeros((1, 24, 24))), np.zeros((1, 512)))


def resampling(image: np.ndarray) -> np.ndarray:
    """Returns the matrix that equalizes the density of an image's rows, row by row, in float64."""
    size = len(image)
    inked = np.flatnonzero((image > 5 / 255).any(1))
    if not len(inked):
        return np.eye(size)
    first, last = inked[0], inked[-1]
    sides = np.abs(np.diff(image, axis=0, prepend=0, append=0)).sum(1)
    density, room = sides[1:] + sides[:-1], np.ones(size)
    for row in range(first, last + 1):
        near = slice(max(row - size // 16, first), min(row + size // 16, last) + 1)
        room[row] = density[near].mean()
    box = slice(first, last + 1)
    room[box] = 0.5 + 0.5 * room[box] / room[box].mean()
    place = np.interp(np.arange(size + 1), np.append(0, np.cumsum(room)), np.arange(size + 1))
    matrix = np.zeros((size, size))
    for row in range(size):
        centre, reach = (place[row] + place[row + 1]) / 2, max(1.0, place[row + 1] - place[row])
        matrix[row] = np.clip(1 - np.abs(np.arange(size) + 0.5 - centre) / reach, 0, None)
    return matrix / matrix.sum(1, keepdims=True)


@pytest.mark.parametrize("size", [32, 40])
def test_density_equalization_agrees_with_a_float64_reference(size: int) -> None:
    images = blobs(4, size)
    images[0, :, : size // 3] = 0.0
    images[1, -size // 3 :] = 0.0
    images[2] = 0.0
    images[3] = 0.0
    images[3, 5, 9:12] = 1.0
    expected = [resampling(x) @ x @ resampling(x.T).T for x in images.astype(np.float64)]
    got = equalize_density(jnp.asarray(images))
    np.testing.assert_allclose(got, expected, atol=2e-5)
    assert np.abs(np.array(expected) - images).max() > 0.2, "something is moved"


def test_crowded_strokes_get_room_in_proportion_to_their_edges() -> None:
    image = np.zeros((96, 96), np.float32)
    for start in range(10, 40, 6):  # five strokes in the upper half of the box, one in the lower
        image[start : start + 2, 8:88] = 1.0
    image[85:87, 8:88] = 1.0
    rows = np.asarray(equalize_density(jnp.asarray(image[None])))[0, :, 40]
    assert rows[86] > 0.3, "the box ends where it did"
    assert not rows[:9].any()
    assert not rows[88:].any()
    fifth = 10 + 24 + 1  # its centre
    before = 0.5 * (fifth - 10) / 77 + 0.5 * 4.5 / 6
    strokes = np.flatnonzero((rows[1:-1] > rows[:-2]) & (rows[1:-1] >= rows[2:])) + 1
    assert len(strokes) == 6
    assert strokes[4] + 0.5 == pytest.approx(10 + 77 * before, abs=1.5)


def gaussians(per_class: int, dims: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns float32 samples of `CLASSES` Gaussians of one covariance, unevenly many, shuffled."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(CLASSES), per_class + np.arange(CLASSES)))
    mixing = noise(dims, dims, seed=9) / math.sqrt(dims)
    means = noise(CLASSES, dims, seed=8)
    samples = means[labels] + rng.normal(size=(len(labels), dims)) @ mixing
    return samples.astype(np.float32), labels


def test_lda_solves_the_generalised_eigenproblem() -> None:
    x, labels = gaussians(60, 12)
    dims = CLASSES - 1
    fitted = fit_mqdf.fit_lda(x, *fit_mqdf.class_rows(labels, CLASSES), dims)
    exact = x.astype(np.float64)
    means = np.stack([exact[labels == k].mean(0) for k in range(CLASSES)])
    centred = exact - means[labels]
    within = centred.T @ centred / len(x)
    within += fit_mqdf.RIDGE * np.trace(within) / 12 * np.eye(12)
    between = np.cov(means[labels].T, bias=True)
    values, vectors = scipy.linalg.eigh(between, within)  # vᵀ · within · v = 1
    weight = np.asarray(fitted["weight"], np.float64)
    signs = np.sign((weight * vectors[:, ::-1][:, :dims]).sum(0))
    np.testing.assert_allclose(weight * signs, vectors[:, ::-1][:, :dims], atol=1e-4)
    reduced = exact @ weight + np.asarray(fitted["bias"])
    np.testing.assert_allclose(reduced.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(weight.T @ within @ weight, np.eye(dims), atol=1e-4)
    np.testing.assert_allclose(np.diag(weight.T @ between @ weight), values[::-1][:dims], rtol=1e-4)


def discriminant(params: dict, x: np.ndarray) -> np.ndarray:
    """Returns logits of a discriminant with given parameters."""
    classes, dims, eigenvectors = params["vectors"].shape
    layer = mqdf.QuadraticDiscriminant(classes, dims, eigenvectors, 1.0)
    nnx.update(layer, params)
    return np.asarray(layer(jnp.asarray(x, jnp.float32)))


@pytest.mark.parametrize("eigenvectors", [0, 3, 7])
def test_discriminant_is_the_log_density_of_its_gaussian(eigenvectors: int) -> None:
    dims, minor = 7, 0.4
    rng = np.random.default_rng(5)
    vectors = np.stack([np.linalg.qr(noise(dims, dims, seed=k))[0] for k in range(CLASSES)])
    variances = rng.uniform(0.5, 3.0, (CLASSES, dims))
    variances[:, eigenvectors:] = minor
    means, x = rng.normal(size=(CLASSES, dims)), rng.normal(size=(50, dims))
    params = {
        "mean": jnp.asarray(means, jnp.float32),
        "vectors": jnp.asarray(vectors[:, :, :eigenvectors], jnp.float32),
        "variances": jnp.asarray(variances[:, :eigenvectors], jnp.float32),
        "minor_variance": jnp.float32(minor),
        "scale": jnp.float32(2.0),
    }
    densities = np.stack(
        [
            scipy.stats.multivariate_normal(means[k], v @ np.diag(variances[k]) @ v.T).logpdf(x)
            for k, v in enumerate(vectors)
        ],
        axis=1,
    )
    constant = dims / 2 * math.log(2 * math.pi)
    np.testing.assert_allclose(discriminant(params, x), 2 * (densities + constant), atol=2e-4)


def test_fitted_discriminant_has_the_moments_of_each_class() -> None:
    x, labels = gaussians(40, 5)
    groups = fit_mqdf.class_rows(labels, CLASSES)
    fitted = fit_mqdf.fit_discriminant(x, *groups, 3, jnp.float32(0.05))
    assert fitted["vectors"].shape == (CLASSES, 5, 3)
    for k in range(CLASSES):
        mine = x[labels == k].astype(np.float64)
        np.testing.assert_allclose(fitted["mean"][k], mine.mean(0), atol=1e-5)
        covariance = np.cov(mine.T, bias=True)
        variances = np.maximum(np.linalg.eigvalsh(covariance)[::-1][:3], 0.05)
        np.testing.assert_allclose(fitted["variances"][k], variances, rtol=1e-4)
        vectors = np.asarray(fitted["vectors"][k], np.float64)
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-5)
        along = np.diag(vectors.T @ covariance @ vectors)
        np.testing.assert_allclose(np.maximum(along, 0.05), variances, rtol=1e-4)


def test_empty_classes_and_small_variances_stay_finite() -> None:
    x, labels = gaussians(4, 5)  # fewer samples than dimensions
    fitted = fit_mqdf.fit_discriminant(
        x, *fit_mqdf.class_rows(labels, CLASSES + 1), 5, jnp.float32(0.3)
    )
    assert float(fitted["variances"].min()) == np.float32(0.3)
    assert np.isfinite(discriminant(fitted, x)).all()


def test_error_rate_is_the_bayes_error() -> None:
    # Two spherical Gaussians at distance 2: the best rule errs in Φ(−1) of all cases.
    rng = np.random.default_rng(3)
    labels = np.repeat([0, 1], 20_000)
    x = rng.normal(size=(40_000, 4))
    x[:, 0] += 2.0 * labels
    groups = fit_mqdf.class_rows(labels, 2)
    fitted = fit_mqdf.fit_discriminant(x.astype(np.float32), *groups, 2, jnp.float32(1.0))
    wrong = (discriminant(fitted, x).argmax(1) != labels).mean()
    assert wrong == pytest.approx(scipy.stats.norm.cdf(-1), abs=0.006)


def test_scale_calibrates_the_probabilities() -> None:
    logits = 4 * noise(20_000, 5).astype(np.float32)
    draws = np.random.default_rng(1).gumbel(size=logits.shape)
    labels = (0.25 * logits + draws).argmax(1)  # drawn from softmax(logits / 4)
    assert float(fit_mqdf.fit_scale(logits, labels)) == pytest.approx(0.25, rel=0.05)


def test_class_rows_hold_every_row_once() -> None:
    _, labels = gaussians(7, 2)
    rows, weights = fit_mqdf.class_rows(labels, CLASSES + 1)
    assert sorted(rows[weights > 0]) == list(range(len(labels)))
    for k in range(CLASSES + 1):
        assert (labels[rows[k][weights[k] > 0]] == k).all()
    np.testing.assert_array_equal(weights.sum(1), [*np.bincount(labels), 0])


def test_size_of_the_published_system() -> None:
    # Liu et al., 2013: 512 features to 160, and 50 eigenvectors for each of 3,755 classes.
    network = create_model("mqdf", num_classes=3755, rngs=nnx.Rngs(0))
    _, params, statistics = split_model(network)
    gaussians = 3755 * (160 + 160 * 50 + 50)
    assert count_parameters(params) == 512 * 160 + 160 + gaussians + 2
    assert statistics == {}
    table, multiply_adds = summarize(network, 64)
    # 12 taps of two Sobel filters; for each of 8 directions 64 lines, then 8, are sampled 8 times.
    features = 12 * 64**2 + 8 * (8 * 64 * 64 + 8 * 8 * 64)
    features += 2 * 64**3  # rows and columns are resampled before
    assert multiply_adds == features + 512 * 160 + gaussians
    assert "quadratic discriminants" in table


def test_few_classes_and_several_channels() -> None:
    network = create_model("mqdf", num_classes=3, channels=3, rngs=nnx.Rngs(0))
    apply, params, _ = split_model(network)
    assert params["lda"]["weight"].shape == (512, 2)
    assert params["discriminant"]["vectors"].shape == (3, 2, 2)
    logits, _ = jax.eval_shape(apply, params, {}, jax.ShapeDtypeStruct((4, 32, 32, 3), "float32"))
    assert (logits.shape, logits.dtype) == ((4, 3), jnp.float32)


# ml_collections loads a config file in a way that Python 3.12 drops.
def test_fit_from_the_command_line_and_evaluate_again(tiny_job: list[str], tmp_path: Path) -> None:
    flags = [
        *(flag for flag in tiny_job if "augment." not in flag and "num_steps" not in flag),
        "--config.model.name=mqdf",
        "--config.model.dropout_rate=0.0",
        "--config.model.width=1.0",
        "--config.num_epochs=1.0",
    ]

    assert jax.device_count() == 4
    fitted = tmp_path / "fitted"
    assert main.main(["main", *flags, f"--workdir={fitted}"]) == 0
    for name in ("config.json", "metrics.jsonl", "report.html", "plots/accuracy.png"):
        assert (fitted / name).is_file()
    results = json.loads((fitted / "eval.json").read_text())
    assert results["step"] == 11, "88 training images in batches of 8"
    assert results["top1"] > 0.5, "one of 8 characters by chance"

    again = ["--mode=eval", f"--checkpoint={fitted}", f"--workdir={tmp_path / 'again'}"]
    assert main.main(["main", *flags, *again]) == 0
    assert json.loads((tmp_path / "again" / "eval.json").read_text()) == results

    one = subprocess.run(
        [sys.executable, "-m", "hccr_jax.main", *flags, f"--workdir={tmp_path / 'one'}"],
        cwd=ROOT, env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert one.returncode == 0, one.stderr
    alone = json.loads((tmp_path / "one" / "eval.json").read_text())
    assert alone["top1"] == results["top1"]
    assert alone["loss"] == pytest.approx(results["loss"], rel=1e-3)
