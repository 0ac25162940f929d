"""The PyTorch baseline of the benchmark: the same networks, written as a PyTorch user would.

Needs the optional extra `peer`.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hccr_jax.models.layers import scaled_channels
from hccr_jax.models.mobilenet_v1 import BLOCKS
from hccr_jax.models.mobilenet_v2 import HEAD_CHANNELS, STAGES


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
        head = scaled_channels(HEAD_CHANNELS, max(1.0, width))
        layers.append(_conv_norm(current, head, 1))
        current = head
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout_rate)]
    network = nn.Sequential(*layers, *pool, nn.Linear(current, num_classes))
    channels_last: Any = network  # PyTorch's annotation of `to` leaves this use out
    return channels_last.to(memory_format=torch.channels_last)


def make_train_runner(
    name: str, num_classes: int, width: float, dropout_rate: float, batch_size: int, image_px: int
) -> tuple[Callable[[int], float], int]:
    """Returns run(num_steps) -> seconds of eager training with Adam, and the parameter count."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = create_network(name, num_classes, width, dropout_rate).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    images = torch.rand(batch_size, 1, image_px, image_px, device=device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(num_classes, (batch_size,), device=device)

    def run(num_steps: int) -> float:
        start = time.perf_counter()
        for _ in range(num_steps):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = nn.functional.cross_entropy(network(images), labels)
            loss.backward()
            optimizer.step()
        loss.item()
        return time.perf_counter() - start

    return run, sum(parameter.numel() for parameter in network.parameters())
