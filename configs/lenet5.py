"""LeNet-5 with the recipe of `configs/hwdb100.py`, on the same real subset.

  hccr train --config=lenet5 --config.data.data_dir=DIR

Accuracy: not measured yet.
"""

from ml_collections import ConfigDict

from hccr_jax.configs import hwdb100


def get_config() -> ConfigDict:
    """Returns the recipe: a network without dropout and batch norm."""
    config = hwdb100.get_config()
    config.model.name = "lenet5"
    config.model.dropout_rate = 0.0
    config.eval.batch_norm_batches = 0
    return config
