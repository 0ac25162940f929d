"""The PyTorch baseline of the benchmark: the same networks, written as a PyTorch user would.

Channels last, float32 on a CPU and bfloat16 autocast on a GPU, fused Adam, augmentation by one
`grid_sample` on the device, images as uint8 in its memory. Needs the optional extra `torch`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hccr_jax.configs import default
from hccr_jax.errors import InputError
from hccr_jax.models.blocks import scaled_channels
from hccr_jax.models.mobilenet_v1 import BLOCKS
from hccr_jax.models.mobilenet_v2 import STAGES
from hccr_jax.runtime.worker_pool import cpu_count
from hccr_jax.train.augment import AugmentOptions

# Each mode adds to the one before: "compile" is `torch.compile` of the whole forward pass and loss;
# "graph" is a CUDA graph of the whole step: augmentation, forward and backward pass, update.
MODES = ("eager", "compile", "graph")
# Options of our augmentation that PyTorch's leaves out, with the values that turn them off.
_ONLY_OURS = {
    "elastic_px": 0.0, "stroke_width": 0.0, "transpose_prob": 0.0, "crop_min": 1.0,
    "contrast": 0.0, "brightness": 0.0,
}  # fmt: skip


def _conv_norm(
    channels_in: int, channels_out: int, kernel: int, stride: int = 1, groups: int = 1,
    relu6: bool = True,
) -> nn.Sequential:  # fmt: skip
    layers: list[nn.Module] = [
        nn.Conv2d(
            channels_in, channels_out, kernel, stride, kernel // 2, groups=groups, bias=False
        ),
        nn.BatchNorm2d(channels_out, eps=1e-3),
    ]
    return nn.Sequential(*layers, *[nn.ReLU6(inplace=True)] * relu6)


class _InvertedResidual(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels_in * expansion
        expand = [_conv_norm(channels_in, hidden, 1)] if expansion > 1 else []
        self.body = nn.Sequential(
            *expand,
            _conv_norm(hidden, hidden, 3, stride, groups=hidden),
            _conv_norm(hidden, channels_out, 1, relu6=False),
        )
        self.shortcut = stride == 1 and channels_in == channels_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x) if self.shortcut else self.body(x)


def create_network(name: str, num_classes: int, width: float, dropout_rate: float) -> nn.Module:
    """Returns MobileNet V1 or V2 for one-channel images, channels last.

    Args:
      name: "mobilenet_v1" or "mobilenet_v2".
      num_classes, width, dropout_rate: as in `models/`.
    """
    current = scaled_channels(32, width)
    layers: list[nn.Module] = [_conv_norm(1, current, 3, 2)]
    if name == "mobilenet_v1":
        for channels, stride in BLOCKS:
            following = scaled_channels(channels, width)
            layers.append(_conv_norm(current, current, 3, stride, groups=current))
            layers.append(_conv_norm(current, following, 1))
            current = following
    else:
        for expansion, channels, repeats, first_stride in STAGES:
            following = scaled_channels(channels, width)
            for index in range(repeats):
                stride = first_stride if index == 0 else 1
                layers.append(_InvertedResidual(current, following, stride, expansion))
                current = following
        head = scaled_channels(default.get_config().model.head_channels, max(1.0, width))
        layers.append(_conv_norm(current, head, 1))
        current = head
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout_rate)]
    network = nn.Sequential(*layers, *pool, nn.Linear(current, num_classes))
    channels_last: Any = network  # PyTorch's annotation of `to` leaves this use out
    return channels_last.to(memory_format=torch.channels_last)


def make_augment(options: AugmentOptions) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns augment(images uint8 (B, S, S)) -> float32 (B, 1, S, S) in [0, 1].

    Raises:
      InputError: an option that only our augmentation has is on.
    """
    for name, neutral in _ONLY_OURS.items():
        if getattr(options, name) != neutral:
            raise InputError(
                f"config.augment.{name}={getattr(options, name)}: PyTorch's augmentation has no "
                f"such option; set it to {neutral}"
            )

    def augment(images: torch.Tensor) -> torch.Tensor:
        batch, size, _ = images.shape
        maps = _draw_maps(options, batch, size, images.device)
        grid = nn.functional.affine_grid(maps, [batch, 1, size, size], align_corners=False)
        x = images[:, None].float() / 255.0
        x = nn.functional.grid_sample(x, grid, align_corners=False)
        if options.erase_prob > 0:
            x = _erase(x, options.erase_prob, options.erase_max_side)
        if options.noise_std > 0:
            x = (x + options.noise_std * torch.randn_like(x)).clamp(0.0, 1.0)
        return x

    return augment


def _draw_maps(
    options: AugmentOptions, batch: int, size: int, device: torch.device
) -> torch.Tensor:
    """Returns random affine maps (B, 2, 3) from the result to the image, for `affine_grid`.

    A stretched image is brought back to size by the larger of its two factors, where ours measures
    the ink: slightly less work than ours.
    """
    draw = functools.partial(_draw, batch, device)

    def happens(probability: float, *shape: int) -> torch.Tensor:
        return draw(0.0, 1.0, *shape) < probability

    def matrix(a: Any, b: Any, c: Any, d: Any) -> torch.Tensor:
        return torch.stack([a, b, c, d], -1).view(batch, 2, 2)

    # From the result to the image: the inverses, in reverse order.
    zero, one = torch.zeros(batch, device=device), torch.ones(batch, device=device)
    flip_x = 1.0 - 2.0 * happens(options.flip_left_right_prob)
    flip_y = 1.0 - 2.0 * happens(options.flip_up_down_prob)
    most = math.radians(options.rotate_deg)
    angle = draw(-most, most) * happens(options.rotate_prob)
    cosine, sine = angle.cos(), angle.sin()
    is_stretched = happens(options.resize_prob, 1)
    factors = draw(options.resize_min, options.resize_max, 2)
    stretch = torch.where(is_stretched, factors, 1.0)
    zoom = draw(1.0 - options.zoom, 1.0 + options.zoom, 1)
    stretch = stretch / stretch.amax(1, keepdim=True) * zoom
    back = (
        matrix(flip_x, zero, zero, flip_y)
        @ matrix(cosine, -sine, sine, cosine)
        @ matrix(1.0 / stretch[:, 0], zero, zero, 1.0 / stretch[:, 1])
        @ matrix(one, -draw(-options.shear, options.shear), zero, one)
    )
    shift = back @ draw(-options.shift_px, options.shift_px, 2, 1) * (-2.0 / size)
    return torch.cat([back, shift], 2)


def _erase(x: torch.Tensor, probability: float, max_side: float) -> torch.Tensor:
    """Returns images (B, 1, S, S), some with a random rectangle set to 0."""
    batch, _, size, _ = x.shape
    draw = functools.partial(_draw, batch, x.device)
    sides = size * draw(0.05, max_side, 2)
    starts = draw(0.0, 1.0, 2) * (size - sides)
    place = torch.arange(size, device=x.device) + 0.5
    inside = (place >= starts[..., None]) & (place < (starts + sides)[..., None])
    inside &= draw(0.0, 1.0, 1, 1) < probability
    return x.masked_fill(inside[:, 1, None, :, None] & inside[:, 0, None, None, :], 0.0)


def _draw(batch: int, device: torch.device, low: float, high: float, *shape: int) -> torch.Tensor:
    """Returns uniform draws (B, …)."""
    return torch.empty(batch, *shape, device=device).uniform_(low, high)


class Baseline:
    """The PyTorch workloads at one batch size.

    Attributes:
      parameters: trained values of the network.
    """

    def __init__(
        self, name: str, num_classes: int, width: float, dropout_rate: float, batch_size: int,
        image_px: int, num_images: int, augment: AugmentOptions,
    ) -> None:  # fmt: skip
        """Creates the network and random images on the device.

        Args:
          name, num_classes, width, dropout_rate: as in `create_network`.
          batch_size: B, images a step.
          image_px: S, side of the images.
          num_images: in the device's memory, for the rows that take their batches from them.
          augment: of `make_augment`.
        """
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        if self._device == "cuda":
            torch.backends.cudnn.benchmark = True
            torch.set_float32_matmul_precision("high")  # TF32
        else:
            torch.set_num_threads(cpu_count())
        self._batch_size = batch_size
        self._network = create_network(name, num_classes, width, dropout_rate).to(self._device)
        self.parameters = sum(parameter.numel() for parameter in self._network.parameters())
        shape = (num_images, image_px, image_px)
        self._images = torch.randint(256, shape, dtype=torch.uint8, device=self._device)
        self._labels = torch.randint(num_classes, (num_images,), device=self._device)
        self._augment = make_augment(augment)

    def make_run(self, row: str, mode: str) -> Callable[[int], None]:
        """Returns run(n), which does n steps of a row and waits for the last.

        The network is shared: finish with the runs of one row before making those of another.

        Args:
          row: "train_step", "train_step_augmented", "forward" or "augment".
          mode: one of `MODES`.

        Raises:
          RuntimeError: a graph is requested without a GPU, or PyTorch cannot compile the step.
        """
        if mode == "graph" and self._device == "cpu":
            raise RuntimeError("skipped: CUDA graphs need a GPU")
        self.release_memory()
        compiled, learns = mode != "eager", row.startswith("train_step")
        self._network.train(learns)
        images, labels = self._images[: self._batch_size], self._labels[: self._batch_size]
        step: Callable[[], Any]
        if learns:
            step = self._train_step(row == "train_step_augmented", compiled)
        elif row == "forward":
            forward = self._compiled_forward if compiled else self._forward
            step = torch.inference_mode()(lambda: forward(images, labels))
        else:
            augment = self._compiled_augment if compiled else self._augment
            step = torch.inference_mode()(lambda: augment(images))
        if mode == "graph":
            step = _capture(step)

        def run(num_steps: int) -> None:
            for _ in range(num_steps):
                step()
            if self._device == "cuda":
                torch.cuda.synchronize()

        return run

    def memory_mib(self) -> float | None:
        """Returns the peak GPU memory of PyTorch since the start of the last `make_run`."""
        return torch.cuda.max_memory_allocated() / 2**20 if self._device == "cuda" else None

    def release_memory(self) -> None:
        """Frees GPU memory that PyTorch caches, for JAX to use."""
        if self._device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _train_step(self, augmented: bool, compiled: bool) -> Callable[[], Any]:
        loss_of = self._compiled_loss if compiled else self._loss
        augment = self._compiled_augment if compiled else self._augment
        on_gpu = self._device == "cuda"
        optimizer = torch.optim.Adam(
            self._network.parameters(), lr=1e-3, fused=True, capturable=on_gpu
        )

        def step() -> None:
            rows = torch.randint(len(self._images), (self._batch_size,), device=self._device)
            images, labels = self._images[rows], self._labels[rows]
            images = augment(images) if augmented else images[:, None].float() / 255.0
            optimizer.zero_grad(set_to_none=True)
            loss_of(images, labels).backward()
            optimizer.step()

        return step

    def _loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        images = images.to(memory_format=torch.channels_last)
        with torch.autocast(self._device, torch.bfloat16, enabled=self._device == "cuda"):
            return nn.functional.cross_entropy(self._network(images), labels)

    def _forward(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Returns losses and the five best with probabilities, as our evaluation step does."""
        x = (images[:, None].float() / 255.0).to(memory_format=torch.channels_last)
        with torch.autocast(self._device, torch.bfloat16, enabled=self._device == "cuda"):
            logits = self._network(x).float()
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        return losses, logits.softmax(1).topk(min(5, logits.shape[1]))

    @functools.cached_property
    def _compiled_loss(self) -> Callable[..., Any]:
        return torch.compile(self._loss, dynamic=False)

    @functools.cached_property
    def _compiled_forward(self) -> Callable[..., Any]:
        return torch.compile(self._forward, dynamic=False)

    @functools.cached_property
    def _compiled_augment(self) -> Callable[..., Any]:
        return torch.compile(self._augment, dynamic=False)


def _capture(step: Callable[[], Any]) -> Callable[[], Any]:
    """Returns the replay of a step on the GPU, captured after a warm-up."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
