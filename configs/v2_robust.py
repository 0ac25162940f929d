"""MobileNetV2 that also reads what is rotated, mirrored or stretched, on the real subset.

python -m hccr_jax.main --config=configs/strokes.py --config.data.data_dir=DIR
python -m hccr_jax.main --config=configs/v2_robust.py --config.data.data_dir=DIR
"""

from ml_collections import ConfigDict

from configs import v2_best


def get_config() -> ConfigDict:
    """Returns `configs/v2_best.py` with every mirroring, wider turns and wider stretches."""
    config = v2_best.get_config()
    config.num_epochs = 45.0
    config.model.dropout_rate = 0.2
    config.augment.flip_left_right_prob = 0.5
    config.augment.flip_up_down_prob = 0.5
    config.augment.rotate_deg = 27.0
    config.augment.resize_min = 0.75
    config.augment.resize_max = 1.35
    config.augment.erase_prob = 0.1
    config.eval.views = 1
    config.eval.flip_views = True
    config.eval.robustness = True
    return config
