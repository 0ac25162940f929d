"""A longer recipe for MobileNetV2 on the real subset of 100 characters: under development.

  python -m hccr_jax.main --config=configs/strokes.py --config.data.data_dir=DIR
  python -m hccr_jax.main --config=configs/v2_best.py --config.data.data_dir=DIR

Measured on 2 cores (AMD EPYC with AVX-512, float32, shared with other work), seed 0, 216 training
writers: 36 min; validation top-1 96.11 % (24 writers, five views), test top-1 96.53 %, top-5
99.43 %. Its training accuracy ends at 98 %: it wants another network (`model.stem_stride=1`), not
more epochs.
"""

from ml_collections import ConfigDict

from configs import hwdb100


def get_config() -> ConfigDict:
    """Returns a long training from weights that have seen simulated writers."""
    config = hwdb100.get_config()
    config.num_epochs = 35.0
    config.init_from = "runs/strokes"
    config.model.dropout_rate = 0.3
    config.data.aspect = "adaptive"
    config.augment.shear = 0.2
    config.augment.elastic_px = 1.5
    config.augment.stroke_width = 0.5
    config.optimizer.average_decay = 0.998
    config.eval.views = 5
    return config
