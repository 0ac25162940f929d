"""The recipe of `configs/v2_best.py` for MobileNetV1: under development, not yet measured.

python -m hccr_jax.main --config=configs/v1_best.py --config.data.data_dir=DIR
"""

from ml_collections import ConfigDict

from configs import v2_best


def get_config() -> ConfigDict:
    """Returns that recipe from the first weights, at half the width."""
    config = v2_best.get_config()
    config.num_epochs = 24.0
    config.init_from = ""
    config.model.name = "mobilenet_v1"
    config.model.width = 0.5
    return config
