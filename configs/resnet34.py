"""ResNet-34 with the recipe of `configs/hwdb100.py`, on the same real subset.

  hccr train --config=resnet34 --config.data.data_dir=DIR

Accuracy: not measured yet.
"""

from ml_collections import ConfigDict

from hccr_jax.configs import resnet18


def get_config() -> ConfigDict:
    """Returns `configs/resnet18.py` with the deeper network."""
    config = resnet18.get_config()
    config.model.name = "resnet34"
    return config
