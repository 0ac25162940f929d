"""A trained network for use in other programs.

Example::

    from hccr_jax import Recognizer

    recognizer = Recognizer.load("runs/v2")
    recognizer("character.png")  # [Candidate(character='啊', probability=0.98), …]
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
from PIL import Image

from hccr_jax.data.images import files, ink
from hccr_jax.data.images.normalize import normalize
from hccr_jax.data.splits import padded_rows
from hccr_jax.errors import InputError
from hccr_jax.inference.pretrained import NORMAL_FORM, Pretrained, load_pretrained
from hccr_jax.inference.rejector import REJECTOR, Rejector, to_traits
from hccr_jax.inference.steps import make_logits_step
from hccr_jax.metrics import calibration
from hccr_jax.models.functional import expose_features
from hccr_jax.paths import expand
from hccr_jax.runtime import sharding

BATCHES = (1, 8, 64)  # images on each device: one compiled program each, and no others

T = TypeVar("T")
Picture = str | Path | Image.Image | np.ndarray


class Candidate(NamedTuple):
    """A character that an image may show, and how likely, from 0 to 1."""

    character: str
    probability: float


class Recognition(NamedTuple):
    """The candidates for an image, and whether it looks like a character at all.

    Attributes:
      candidates: best first.
      p_value: the share of properly written characters that look no more like one; below 0.05, say,
        it may be crossed out, another sign or a scrawl. None if the run has no rejector.
    """

    candidates: list[Candidate]
    p_value: float | None


class Recognizer:
    """A trained network with everything from a picture to its candidates.

    Attributes:
      classes: the characters, in the order of the logits.
      temperature: divisor of the logits.
      is_calibrated: whether the temperature was fitted; otherwise it is 1, and the probabilities
        may be over- or underconfident.
      can_reject: whether it has a rejector, for p-values.
      num_tta_views: of an image, in test-time augmentation.
      form: the arguments of `normalize.normalize` after the bitmap.
    """

    def __init__(
        self,
        pretrained: Pretrained,
        temperature: float | None = None,
        rejector: Rejector | None = None,
    ) -> None:
        """Creates the recogniser; `load` is the usual way.

        Args:
          pretrained: from `pretrained.load_pretrained`.
          temperature: fitted to the validation split, or None.
          rejector: fitted to this network, or None.
        """
        network, data = pretrained.network, pretrained.config.data
        self.classes = pretrained.classes
        self.temperature = 1.0 if temperature is None else temperature
        self.is_calibrated = temperature is not None
        self.form = [data[key] for key in NORMAL_FORM]
        self.can_reject = rejector is not None
        self.num_tta_views = network.num_tta_views
        self._rejector = rejector
        views, member = network.tta_views, network.member
        self._step = make_logits_step(network.apply, network.mesh, views, member, self.can_reject)
        params = expose_features(network.params) if rejector else network.params
        self._variables = network.variables._replace(params=params)
        self._mesh = network.mesh

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Returns the recogniser of a run's best step, with the run's test-time augmentation.

        Temperature and rejector are those that the run's final evaluation has written to its
        folder, if they are of this step and number of views.

        Args:
          path: folder of a run, or its folder checkpoints.

        Raises:
          InputError: there is no such run, or no checkpoint in it.
        """
        pretrained = load_pretrained(path)
        rejector = _read(pretrained, REJECTOR, Rejector.from_json)
        return cls(pretrained, read_temperature(pretrained), rejector)

    def __call__(self, picture: Picture, top: int = 5) -> list[Candidate]:
        """Returns the best candidates for a picture of one character, best first.

        Args:
          picture: see `prepare`.
          top: the most candidates to return.

        Raises:
          InputError: the picture cannot be read or shows no ink.
        """
        return self.classify(self.prepare(picture)[None], top)[0]

    def recognize(self, images: Iterable[Picture], top: int = 5) -> Iterator[list[Candidate]]:
        """Yields the candidates of each of many pictures, read batch by batch.

        Args:
          images: see `prepare`.
          top: the most candidates of each.

        Raises:
          InputError: a picture cannot be read or shows no ink.
        """
        for forms in in_batches(map(self.prepare, images), self.batch_size):
            yield from self.classify(np.stack(forms), top)

    def prepare(self, picture: Picture) -> np.ndarray:
        """Returns a picture of one character in normal form, uint8 (S, S), ink high.

        Args:
          picture: a picture file, or an argument of `files.to_grey`; dark on light or light
            on dark, of any size, colour and illumination.

        Raises:
          InputError: it cannot be read, or shows no ink.
        """
        name = "image"
        if isinstance(picture, str | Path):
            name = str(picture)
            grey, record, _ = next(files.open_pictures(expand(picture)))
            if record is not None:
                raise InputError(f"{name}: a GNT file: give its bitmaps one by one")
        else:
            grey = files.to_grey(picture, name)
        return self.to_normal_form(ink.to_bitmap(grey, name))

    def to_normal_form(self, bitmap: np.ndarray) -> np.ndarray:
        """Returns the normal form, uint8 (S, S), of a bitmap like CASIA's, (H, W), paper 255."""
        return normalize(bitmap, *self.form)

    def classify(self, forms: np.ndarray, top: int = 5) -> list[list[Candidate]]:
        """Returns the best candidates for images in normal form, best first.

        Args:
          forms: uint8 (N, S, S), ink high, paper 0.
          top: the most candidates of each.
        """
        return [recognition.candidates for recognition in self.judge(forms, top)]

    def judge(self, forms: np.ndarray, top: int = 5) -> list[Recognition]:
        """Returns the candidates and the p-value of each image in normal form.

        Args:
          forms, top: as for `classify`.
        """
        recognitions: list[Recognition] = []
        for start in range(0, len(forms), self.batch_size):
            batch = forms[start : start + self.batch_size]
            logits, *features = self._outputs(batch)
            probabilities = calibration.probabilities(logits, self.temperature)
            ranked = np.argsort(-probabilities, axis=1, kind="stable")[:, :top]
            best = np.take_along_axis(probabilities, ranked, axis=1)
            p_values: list[Any] = [None] * len(batch)
            if self._rejector:
                scores = self._rejector.scores(to_traits(logits, *features))
                p_values = self._rejector.p_values(scores).tolist()
            for *row, p_value in zip(ranked, best, p_values, strict=True):
                pairs = zip(*row, strict=True)
                candidates = [Candidate(self.classes[index], float(p)) for index, p in pairs]
                recognitions.append(Recognition(candidates, p_value))
        return recognitions

    @property
    def batch_size(self) -> int:
        """The most images of one call of the network."""
        return BATCHES[-1] * self._mesh.size

    def warm_up(self) -> None:
        """Compiles every program, so that no later call waits for a compilation."""
        for size in BATCHES:
            self._outputs(np.zeros((size * self._mesh.size, *[self.form[0]] * 2), np.uint8))

    def _outputs(self, forms: np.ndarray) -> list[np.ndarray]:
        """Returns the network's outputs for a batch, filled up to the next size of `BATCHES`."""
        size = next(n * self._mesh.size for n in BATCHES if n * self._mesh.size >= len(forms))
        (rows,) = padded_rows(len(forms), size)
        images = sharding.shard_batch(forms[rows], self._mesh)
        return [np.asarray(part)[: len(forms)] for part in self._step(self._variables, images)]


def in_batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yields lists of `size` items, the last one shorter.

    >>> list(in_batches("abcde", 2))
    [['a', 'b'], ['c', 'd'], ['e']]
    """
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def read_temperature(pretrained: Pretrained) -> float | None:
    """Returns the temperature in a run's eval.json, or None if it is not of these weights."""
    found = _read(pretrained, "eval.json", lambda value: float(value["temperature"]))
    return found if found is not None and found > 0 else None


def _read(pretrained: Pretrained, name: str, parse: Callable[[dict[str, Any]], T]) -> T | None:
    """Returns a value from a file in a run's folder, or None if it is not of these weights.

    Args:
      pretrained: the weights, and the number of views, that the file must be of.
      name: of the file.
      parse: extracts the value from the JSON object.
    """
    path = pretrained.source.parent.parent / name
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text("utf-8"))
        fits = [value["step"], value["views"]] == [
            pretrained.step,
            pretrained.network.num_tta_views,
        ]
        return parse(value) if fits else None
    except (ValueError, KeyError, TypeError):
        return None
