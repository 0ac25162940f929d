"""ResNet-18, -34 and -50."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hccr_jax.models.folding import INPUT, Folding
from hccr_jax.models.layers import Classifier, ConvNorm, MaxPool

STAGE_CHANNELS = (64, 128, 256, 512)


class BasicBlock(nnx.Module):
    """Two 3×3 convolutions with a shortcut around them; for depths below 50."""

    widening = 1

    def __init__(self, channels_in: int, channels: int, stride: int, **common: Any) -> None:
        self.first = ConvNorm(channels_in, channels, 3, stride, relu6=False, **common)
        self.last = ConvNorm(channels, channels, 3, relu6=False, **common)
        self.projection = _projection(channels_in, channels, stride, common)

    def __call__(self, x: jax.Array, train: bool, axis_name: str | None) -> jax.Array:
        """Maps (B, H, W, C) to (B, ⌈H/stride⌉, ⌈W/stride⌉, C')."""
        y = jax.nn.relu(self.first(x, train, axis_name))
        y = self.last(y, train, axis_name)
        return jax.nn.relu(y + (self.projection(x, train, axis_name) if self.projection else x))


class Bottleneck(nnx.Module):
    """1×1, 3×3 and 1×1 convolutions with a shortcut around them; for depths from 50.

    The stride is in the 3×3 convolution, which skips no input; He et al. have it in the first one.
    The parameters are the same.
    """

    widening = 4

    def __init__(self, channels_in: int, channels: int, stride: int, **common: Any) -> None:
        outputs = channels * self.widening
        self.first = ConvNorm(channels_in, channels, 1, relu6=False, **common)
        self.middle = ConvNorm(channels, channels, 3, stride, relu6=False, **common)
        self.last = ConvNorm(channels, outputs, 1, relu6=False, **common)
        self.projection = _projection(channels_in, outputs, stride, common)

    def __call__(self, x: jax.Array, train: bool, axis_name: str | None) -> jax.Array:
        """Maps (B, H, W, C) to (B, ⌈H/stride⌉, ⌈W/stride⌉, 4 · channels)."""
        y = jax.nn.relu(self.first(x, train, axis_name))
        y = jax.nn.relu(self.middle(y, train, axis_name))
        y = self.last(y, train, axis_name)
        return jax.nn.relu(y + (self.projection(x, train, axis_name) if self.projection else x))


def _projection(
    channels_in: int, channels_out: int, stride: int, common: dict[str, Any]
) -> ConvNorm | None:
    """Returns the projection shortcut, or None where input and output have the same shape."""
    if stride == 1 and channels_in == channels_out:
        return None
    return ConvNorm(channels_in, channels_out, 1, stride, relu6=False, **common)


class ResNet(nnx.Module):
    """A residual network: 7×7 stem, max pooling, four stages of blocks, a dense classifier.

    Args:
      block: `BasicBlock` or `Bottleneck`.
      repeats: blocks of each stage.
      num_classes: K.
      channels: image channels, C.
      stem_stride: of the first convolution; 1 doubles the side of every feature map.
      dropout_rate: before the classifier; He et al. have none.
      batch_norm_epsilon: constant added to the variances.
      dtype: compute dtype; parameters and logits are float32.

    Source: section 2.3 of the paper; He et al., https://arxiv.org/abs/1512.03385, Table 1.
    """

    def __init__(
        self, block: type[BasicBlock | Bottleneck], repeats: tuple[int, ...], *,
        num_classes: int, channels: int, stem_stride: int, dropout_rate: float,
        batch_norm_epsilon: float, dtype: jnp.dtype, rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        common: dict[str, Any] = {"epsilon": batch_norm_epsilon, "dtype": dtype, "rngs": rngs}
        current = STAGE_CHANNELS[0]
        self.stem = ConvNorm(channels, current, 7, stem_stride, relu6=False, **common)
        self.pool = MaxPool(padding=1)
        blocks = []
        for stage, (count, stage_channels) in enumerate(zip(repeats, STAGE_CHANNELS, strict=True)):
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(block(current, stage_channels, stride, **common))
                current = stage_channels * block.widening
        self.blocks = nnx.List(blocks)
        self.classifier = Classifier(current, num_classes, dropout_rate, dtype=dtype, rngs=rngs)

    def __call__(
        self, images: jax.Array, train: bool = False, dropout_keys: jax.Array | None = None,
        axis_name: str | None = None,
    ) -> jax.Array:  # fmt: skip
        """Maps images (B, H, W, C), ink 1 and paper 0, to float32 logits (B, K)."""
        x = self.pool(jax.nn.relu(self.stem(images, train, axis_name)))
        for block in self.blocks:
            x = block(x, train, axis_name)
        return self.classifier(x, train, dropout_keys)

    def fold(self, folding: Folding) -> None:
        """Adds the network's layers, for export."""
        x = folding.conv(INPUT, self.stem, "relu")
        x = folding.unweighted("max_pool", x, padding=self.pool.padding)
        for block in self.blocks:
            y = folding.conv(x, block.first, "relu")
            y = folding.conv(y, block.middle, "relu") if hasattr(block, "middle") else y
            y = folding.conv(y, block.last)
            shortcut = folding.conv(x, block.projection) if block.projection else x
            x = folding.unweighted("add", y, shortcut, activation="relu")
        folding.classifier(x, self.classifier)


resnet18 = functools.partial(ResNet, BasicBlock, (2, 2, 2, 2))
resnet34 = functools.partial(ResNet, BasicBlock, (3, 4, 6, 3))
resnet50 = functools.partial(ResNet, Bottleneck, (3, 4, 6, 3))
