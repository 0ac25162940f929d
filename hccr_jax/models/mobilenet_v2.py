"""MobileNet V2."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hccr_jax.models.blocks import (
    InvertedResidual,
    activated,
    fuses,
    hidden_map,
    scaled_channels,
)  # fmt: skip
from hccr_jax.models.folding import INPUT, Folding
from hccr_jax.models.layers import Classifier, ConvNorm

# (expansion, output channels, repeats, first stride) of each row of Table 3.
STAGES = (
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
    (6, 320, 1, 1),
)  # fmt: skip
FIRST_STRIDED = 1


class MobileNetV2(nnx.Module):
    """MobileNet V2: a stem, 17 inverted residuals, a 1×1 head, a dense classifier.

    Args:
      num_classes: K.
      channels: image channels, C.
      width: width multiplier; the head's is never below 1.
      stem_stride: of the first convolution; 1 doubles the side of every feature map.
      first_stride: of the first block with a stride; 1 doubles the side of the maps from there on,
        for less than a stem of stride 1 costs.
      head_channels: of the 1×1 convolution before the global average.
      dropout_rate: of the classifier's input.
      batch_norm_epsilon: constant added to the variances.
      dtype: compute dtype; parameters and logits are float32.

    Source: Table 3 of the paper (its text counts 19 blocks, its table 17);
    https://arxiv.org/abs/1801.04381.
    """

    def __init__(
        self, *, num_classes: int, channels: int, width: float, stem_stride: int,
        first_stride: int, head_channels: int, dropout_rate: float, batch_norm_epsilon: float,
        dtype: jnp.dtype, rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        common: dict[str, Any] = {"epsilon": batch_norm_epsilon, "dtype": dtype, "rngs": rngs}
        current = scaled_channels(32, width)
        self.stem = ConvNorm(channels, current, 3, stem_stride, **common)
        blocks = []
        for number, (expansion, stage_channels, repeats, stride) in enumerate(STAGES):
            following = scaled_channels(stage_channels, width)
            stride = first_stride if number == FIRST_STRIDED else stride
            for block_stride in (stride, *[1] * (repeats - 1)):
                blocks.append(
                    InvertedResidual(current, following, block_stride, expansion, **common)
                )
                current = following
        self.blocks = nnx.List(blocks)
        head = scaled_channels(head_channels, max(1.0, width))
        self.head = ConvNorm(current, head, 1, **common)
        self.classifier = Classifier(head, num_classes, dropout_rate, dtype=dtype, rngs=rngs)

    def __call__(
        self, images: jax.Array, train: bool = False, dropout_keys: jax.Array | None = None,
        axis_name: str | None = None,
    ) -> jax.Array:  # fmt: skip
        """Maps images (B, H, W, C), ink 1 and paper 0, to float32 logits (B, K)."""
        first, *others = self.blocks
        x = first(images, train, axis_name, stem=self.stem)
        for block in others:
            x = block(x, train, axis_name)
        if fuses(self.head, train):
            x = activated(hidden_map(self.head, x, axis_name), self.head.norm)
        else:
            x = self.head(x, train, axis_name)
        return self.classifier(x, train, dropout_keys)

    def fold(self, folding: Folding) -> None:
        """Adds the network's layers, for export."""
        x = folding.conv(INPUT, self.stem)
        for block in self.blocks:
            y = folding.conv(x, block.expand) if block.expand else x
            y = folding.depthwise(y, block.depthwise, block.norm)
            y = folding.conv(y, block.project)
            x = folding.unweighted("add", y, x) if block.shortcut else y
        folding.classifier(folding.conv(x, self.head), self.classifier)
