"""The paper's recipe with MobileNetV1.

  hccr train --config=v1 --config.data.data_dir=DIR

Accuracy: not measured yet.
"""

from ml_collections import ConfigDict

from hccr_jax.configs import v2


def get_config() -> ConfigDict:
    """Returns `configs/v2.py` with the other network."""
    config = v2.get_config()
    config.model.name = "mobilenet_v1"
    return config
