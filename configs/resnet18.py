"""ResNet-18 with the recipe of `configs/hwdb100.py`, on the same real subset.

  hccr train --config=resnet18 --config.data.data_dir=DIR

Accuracy: not measured yet.
"""

from ml_collections import ConfigDict

from hccr_jax.configs import hwdb100


def get_config() -> ConfigDict:
    """Returns `configs/hwdb100.py` with the other network and half the learning rate."""
    config = hwdb100.get_config()
    config.model.name = "resnet18"
    config.optimizer.learning_rate = 1e-3
    return config
