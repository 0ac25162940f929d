"""LeNet-5."""

import jax
import jax.numpy as jnp
from flax import nnx

from hccr_jax.models.folding import INPUT, Folding
from hccr_jax.models.layers import AveragePool, Conv, Dense


class LeNet5(nnx.Module):
    """LeNet-5: two convolutions with average pooling, a flattening one, two dense layers.

    The feature maps of 32 px images, LeCun's, have 28×28, 14×14, 10×10 and 5×5 pixels; of 64 px,
    60×60, 30×30, 26×26 and 13×13. The flattening convolution (C5) is as large as the last map, so
    it is computed as a dense layer. As usual today, each map of C3 takes all maps of S2, pooling
    has no weights, the activation is tanh, and a softmax replaces the distances to drawn digits.

    Args:
      num_classes: K.
      channels: image channels, C.
      image_px: side of the images, S.
      dtype: compute dtype; parameters and logits are float32.

    Source: section 2.1 of the paper; LeCun et al., Gradient-based learning applied to document
    recognition, 1998, section II.B.
    """

    def __init__(
        self, *, num_classes: int, channels: int, image_px: int, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        self.conv1 = Conv(channels, 6, 5, padding=0, bias=True, dtype=dtype, rngs=rngs)
        self.conv3 = Conv(6, 16, 5, padding=0, bias=True, dtype=dtype, rngs=rngs)
        self.pool = AveragePool()
        side = ((image_px - 4) // 2 - 4) // 2
        self.conv5 = Dense(side * side * 16, 120, dtype=dtype, rngs=rngs)
        self.hidden6 = Dense(120, 84, dtype=dtype, rngs=rngs)
        self.classifier = Dense(84, num_classes, dtype=dtype, rngs=rngs)

    def __call__(
        self, images: jax.Array, train: bool = False, dropout_keys: jax.Array | None = None,
        axis_name: str | None = None,
    ) -> jax.Array:  # fmt: skip
        """Maps images (B, H, W, C), ink 1 and paper 0, to float32 logits (B, K)."""
        x = self.pool(jnp.tanh(self.conv1(images)))
        x = self.pool(jnp.tanh(self.conv3(x)))
        x = jnp.tanh(self.conv5(x.reshape(len(x), -1)))
        return self.classifier(jnp.tanh(self.hidden6(x)))

    def fold(self, folding: Folding) -> None:
        """Adds the network's layers, for export."""
        x = INPUT
        for conv in (self.conv1, self.conv3):
            x = folding.unweighted("average_pool", folding.conv(x, conv, "tanh"))
        x = folding.unweighted("flatten", x)
        for hidden in (self.conv5, self.hidden6):
            x = folding.dense(x, hidden, "tanh")
        folding.dense(x, self.classifier)
