"""AlexNet with the recipe of `configs/hwdb100.py`, on the same real subset.

  hccr train --config=alexnet --config.data.data_dir=DIR

Accuracy: not measured yet.
"""

from ml_collections import ConfigDict

from hccr_jax.configs import hwdb100


def get_config() -> ConfigDict:
    """Returns the recipe: its dropout, and a smaller learning rate for want of batch norm."""
    config = hwdb100.get_config()
    config.model.name = "alexnet"
    config.model.dropout_rate = 0.5
    config.optimizer.learning_rate = 3e-4
    config.eval.batch_norm_batches = 0
    return config
