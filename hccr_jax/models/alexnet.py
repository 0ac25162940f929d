"""AlexNet."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hccr_jax.errors import InputError
from hccr_jax.models.folding import INPUT, Folding
from hccr_jax.models.layers import Conv, Dense, MaxPool, he_uniform

# (output channels, kernel size, followed by max pooling) of the five convolutions.
CONVOLUTIONS = (
    (64, 11, True), (192, 5, True), (384, 3, False), (256, 3, False), (256, 3, True)
)  # fmt: skip
DENSE_CHANNELS = 4096


class AlexNet(nnx.Module):
    """AlexNet: five convolutions, overlapping max pooling, three dense layers, dropout, ReLU.

    The later version in one column, without the groups that split the first over two GPUs, and
    without local response normalisation. At 64 px the first stride is 2 instead of 4: the feature
    maps have 32×32, 15×15 and 7×7 pixels, and 3×3 before the dense layers.

    Args:
      num_classes: K.
      channels: image channels, C.
      image_px: side of the images, S; the first dense layer takes the whole last feature map.
      stem_stride: of the first convolution.
      dropout_rate: of the inputs of the last two dense layers.
      dtype: compute dtype; parameters and logits are float32.

    Raises:
      InputError: the images are too small for three poolings.

    Source: section 2.2 of the paper; Krizhevsky et al., NIPS 2012, and
    https://arxiv.org/abs/1404.5997 for the one column.
    """

    def __init__(
        self, *, num_classes: int, channels: int, image_px: int, stem_stride: int,
        dropout_rate: float, dtype: jnp.dtype, rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        common: dict[str, Any] = {"initial": he_uniform, "dtype": dtype, "rngs": rngs}
        convolutions = []
        side = -(-image_px // stem_stride)
        for index, (outputs, kernel, pooled) in enumerate(CONVOLUTIONS):
            stride = stem_stride if index == 0 else 1
            conv = Conv(channels, outputs, kernel, stride, bias=True, **common)
            convolutions.append(conv)
            channels = outputs
            side = (side - 1) // 2 if pooled else side
        self.convolutions = nnx.List(convolutions)
        self.pool = MaxPool()
        if side < 1:
            raise InputError(
                f"config.data.image_px={image_px}: too small for the three poolings of AlexNet "
                f"after a first stride of {stem_stride}"
            )
        size = side * side * channels
        self.hidden1 = Dense(size, DENSE_CHANNELS, **common)
        self.hidden2 = Dense(DENSE_CHANNELS, DENSE_CHANNELS, dropout_rate, **common)
        self.classifier = Dense(DENSE_CHANNELS, num_classes, dropout_rate, dtype=dtype, rngs=rngs)

    def __call__(
        self, images: jax.Array, train: bool = False, dropout_keys: jax.Array | None = None,
        axis_name: str | None = None,
    ) -> jax.Array:  # fmt: skip
        """Maps images (B, H, W, C), ink 1 and paper 0, to float32 logits (B, K)."""
        x = images
        for conv, (_, _, pooled) in zip(self.convolutions, CONVOLUTIONS, strict=True):
            x = jax.nn.relu(conv(x))
            x = self.pool(x) if pooled else x
        keys1 = keys2 = None
        if dropout_keys is not None:
            keys1, keys2 = jax.vmap(jax.random.split, out_axes=1)(dropout_keys)
        x = jax.nn.relu(self.hidden1(x.reshape(len(x), -1)))
        x = jax.nn.relu(self.hidden2(x, train, keys1))
        return self.classifier(x, train, keys2)

    def fold(self, folding: Folding) -> None:
        """Adds the network's layers, for export."""
        x = INPUT
        for conv, (_, _, pooled) in zip(self.convolutions, CONVOLUTIONS, strict=True):
            x = folding.conv(x, conv, "relu")
            x = folding.unweighted("max_pool", x) if pooled else x
        x = folding.unweighted("flatten", x)
        for hidden in (self.hidden1, self.hidden2):
            x = folding.dense(x, hidden, "relu")
        folding.dense(x, self.classifier)
