"""A trained recogniser in a program of one's own.

Example::

    from hccr_jax.recognizer import Recognizer

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
from hccr_jax.errors import InputError
from hccr_jax.inference.pretrained import NORMAL_FORM, Pretrained, load_pretrained
from hccr_jax.inference.rejector import REJECTOR, Rejector, to_traits
from hccr_jax.inference.steps import make_logits_step
from hccr_jax.metrics import calibration
from hccr_jax.models.functional import expose_features
from hccr_jax.runtime import sharding

BATCHES = (1, 8, 64)  # images on each device: one compiled program each, and no others

T = TypeVar("T")
Picture = str | Path | Image.Image | np.ndarray


class Candidate(NamedTuple):
    """A character that an image may show, and how likely, from 0 to 1."""

    character: str
    probability: float


class Answer(NamedTuple):
    """What an image may show, and whether it looks like a character at all.

    Attributes:
      candidates: best first.
      p_value: the share of properly written characters that look no more like one; below 0.05, say,
        it may be crossed out, another sign or a scrawl. None where the run has no rejector.
    """

    candidates: list[Candidate]
    p_value: float | None


class Recognizer:
    """A trained network with everything between a picture and the characters that it may show.

    Attributes:
      classes: the characters it knows.
      temperature: that its logits are divided by.
      is_calibrated: whether the temperature was fitted; otherwise it is 1, and the probabilities
        may be too sure or too modest.
      can_reject: whether it tells what is no character.
      num_tta_views: of an image that the network sees.
      form: what `canvas.normalize` is called with besides a bitmap.
    """

    def __init__(
        self,
        pretrained: Pretrained,
        temperature: float | None = None,
        rejector: Rejector | None = None,
    ) -> None:
        """Takes a trained network.

        Args:
          pretrained: from `pretrained.load_pretrained`.
          temperature: fitted to the validation split; None where there is none.
          rejector: of this network; None where there is none.
        """
        network, data = pretrained.network, pretrained.config.data
        self.classes = pretrained.classes
        self.temperature = 1.0 if temperature is None else temperature
        self.is_calibrated = temperature is not None
        self.form = [data[key] for key in NORMAL_FORM]
        self.can_reject = rejector is not None
        self.num_tta_views = network.num_tta_views
        self._rejector = rejector
        self._step = make_logits_step(network.apply, network.mesh, network.views, self.can_reject)
        params = expose_features(network.params) if rejector else network.params
        self._variables = params, network.batch_stats
        self._mesh = network.mesh

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Returns the recogniser of a run's best step, with as many views as the run evaluates.

        Temperature and rejector are those that the run's last evaluation has left in its folder,
        where they are of this step and these views.

        Args:
          path: folder of a run, or its folder checkpoints.

        Raises:
          InputError: there is no such run, or no checkpoint in it.
        """
        pretrained = load_pretrained(path)
        rejector = _read(pretrained, REJECTOR, Rejector.from_json)
        return cls(pretrained, read_temperature(pretrained), rejector)

    def __call__(self, picture: Picture, top: int = 5) -> list[Candidate]:
        """Returns the best candidates for the one character on a picture, best first.

        Args:
          picture: see `prepare`.
          top: the most candidates to return.

        Raises:
          InputError: the picture cannot be read or shows no ink.
        """
        return self.classify(self.prepare(picture)[None], top)[0]

    def recognize(self, images: Iterable[Picture], top: int = 5) -> Iterator[list[Candidate]]:
        """Yields the candidates of each of many pictures, which are read batch by batch.

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
          picture: a PNG or JPEG file, or an image or array as `pictures.to_grey` takes it; dark on
            light or light on dark, of any size, colour and light.

        Raises:
          InputError: it cannot be read, or shows no ink.
        """
        name = "image"
        if isinstance(picture, str | Path):
            name = str(picture)
            grey, record, _ = next(files.open_pictures(Path(picture).expanduser()))
            if record is not None:
                raise InputError(f"{name}: a GNT file: give its bitmaps one by one")
        else:
            grey = files.to_grey(picture, name)
        return self.to_normal_form(ink.to_bitmap(grey, name))

    def to_normal_form(self, bitmap: np.ndarray) -> np.ndarray:
        """Returns a bitmap like CASIA's, uint8 (H, W), 255 paper, in normal form (S, S)."""
        return normalize(bitmap, *self.form)

    def classify(self, forms: np.ndarray, top: int = 5) -> list[list[Candidate]]:
        """Returns the best candidates for images in normal form, best first.

        Args:
          forms: uint8 (N, S, S), ink high, paper 0.
          top: the most candidates of each.
        """
        return [answer.candidates for answer in self.judge(forms, top)]

    def judge(self, forms: np.ndarray, top: int = 5) -> list[Answer]:
        """Returns the answers to images in normal form.

        Args:
          forms, top: as for `classify`.
        """
        answers: list[Answer] = []
        for start in range(0, len(forms), self.batch_size):
            batch = forms[start : start + self.batch_size]
            logits, *features = self._outputs(batch)
            weights = calibration.probabilities(logits, self.temperature)
            places = np.argsort(-weights, axis=1, kind="stable")[:, :top]
            best = np.take_along_axis(weights, places, axis=1)
            p_values: list[Any] = [None] * len(batch)
            if self._rejector:
                scores = self._rejector.scores(to_traits(logits, *features))
                p_values = self._rejector.p_values(scores).tolist()
            answers += [
                Answer([Candidate(self.classes[i], float(p)) for i, p in zip(*row, strict=True)], p)
                for *row, p in zip(places, best, p_values, strict=True)
            ]
        return answers

    @property
    def batch_size(self) -> int:
        """Images that go through together."""
        return BATCHES[-1] * self._mesh.size

    def warm_up(self) -> None:
        """Compiles every program, so that no later call waits for one."""
        for size in BATCHES:
            self._outputs(np.zeros((size * self._mesh.size, *[self.form[0]] * 2), np.uint8))

    def _outputs(self, forms: np.ndarray) -> list[np.ndarray]:
        """Returns what the network makes of a batch, filled up to a size that is compiled."""
        size = next(n * self._mesh.size for n in BATCHES if n * self._mesh.size >= len(forms))
        filled = np.zeros((size, *forms.shape[1:]), np.uint8)
        filled[: len(forms)] = forms
        images = sharding.shard_batch(filled, self._mesh)
        return [np.asarray(part)[: len(forms)] for part in self._step(*self._variables, images)]


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
    """Returns the temperature in a run's eval.json, or None where it is not of these weights."""
    found = _read(pretrained, "eval.json", lambda value: float(value["temperature"]))
    return found if found is not None and found > 0 else None


def _read(pretrained: Pretrained, name: str, parse: Callable[[dict[str, Any]], T]) -> T | None:
    """Returns what a file in a run's folder says, or None where it is not of these weights.

    Args:
      pretrained: the weights, and the views of an image that the file goes with.
      name: of the file.
      parse: takes it out of the JSON object.
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
