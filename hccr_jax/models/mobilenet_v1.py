"""MobileNet V1."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hccr_jax.models.blocks import (
    DepthwiseSeparable,
    activated,
    fuses,
    hidden_map,
    scaled_channels,
)  # fmt: skip
from hccr_jax.models.folding import INPUT, Folding
from hccr_jax.models.layers import Classifier, ConvNorm

# (output channels, stride) of the 13 blocks. Table 1 of the paper has misprints in three rows (the
# 128→256 layers and the last depthwise stride); this is the network of its authors' code.
BLOCKS = (
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2),
    (512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1),
)  # fmt: skip
FIRST_STRIDED = 1


class MobileNetV1(nnx.Module):
    """MobileNet V1: a stem, 13 depthwise-separable blocks, a dense classifier.

    Args:
      num_classes: K.
      channels: image channels, C.
      width: width multiplier.
      stem_stride: of the first convolution; 1 doubles the side of every feature map.
      first_stride: of the first block with a stride; 1 doubles the side of the maps from there on,
        for less than a stem of stride 1 costs.
      dropout_rate: of the classifier's input.
      batch_norm_epsilon: constant added to the variances.
      dtype: compute dtype; parameters and logits are float32.

    Source: Table 1 of the paper; https://arxiv.org/abs/1704.04861.
    """

    def __init__(
        self, *, num_classes: int, channels: int, width: float, stem_stride: int,
        first_stride: int, dropout_rate: float, batch_norm_epsilon: float, dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        common: dict[str, Any] = {"epsilon": batch_norm_epsilon, "dtype": dtype, "rngs": rngs}
        current = scaled_channels(32, width)
        self.stem = ConvNorm(channels, current, 3, stem_stride, **common)
        blocks = []
        for number, (block_channels, stride) in enumerate(BLOCKS):
            stride = first_stride if number == FIRST_STRIDED else stride
            following = scaled_channels(block_channels, width)
            blocks.append(DepthwiseSeparable(current, following, stride, **common))
            current = following
        self.blocks = nnx.List(blocks)
        self.classifier = Classifier(current, num_classes, dropout_rate, dtype=dtype, rngs=rngs)

    def __call__(
        self, images: jax.Array, train: bool = False, dropout_keys: jax.Array | None = None,
        axis_name: str | None = None,
    ) -> jax.Array:  # fmt: skip
        """Maps images (B, H, W, C), ink 1 and paper 0, to float32 logits (B, K)."""
        x, before = images, self.stem
        if fuses(before, train):
            hidden = hidden_map(before, x, axis_name, wants_input=False)
            for block in self.blocks:
                hidden, before = block.fused(hidden, before, axis_name), block.pointwise
            x = activated(hidden, before.norm)
        else:
            for block in self.blocks:
                x, before = block(x, before, train, axis_name), block.pointwise
            x = before(x, train, axis_name)
        return self.classifier(x, train, dropout_keys)

    def fold(self, folding: Folding) -> None:
        """Adds the network's layers, for export."""
        x = folding.conv(INPUT, self.stem)
        for block in self.blocks:
            x = folding.depthwise(x, block.depthwise, block.norm)
            x = folding.conv(x, block.pointwise)
        folding.classifier(x, self.classifier)
