"""The classical recogniser on the real subset of CASIA-HWDB1.1: features, LDA and MQDF.

  hccr train --config=mqdf --config.data.data_dir=DIR

On 2 cores (AMD EPYC with AVX2, float32, shared with two trainings) the fit took 16 s. MQDF alone on
one view: test top-1 94.99 %, top-5 99.26 % (5,973 characters of 60 writers); validation top-1
93.26 % (24 writers), on which the settings were chosen. Without the widening of crowded strokes
that precedes the features, the same fit reached 93.07 % on test and 91.26 % on validation. 560,689
parameters, 1.4 million multiply-adds an image. With 3,755 classes such a system reaches 89.55 % on
HWDB1.1 (Liu et al., 2013). `model.mqdf_weight` ensembles it with a network.
"""

from ml_collections import ConfigDict

from hccr_jax.configs import default


def get_config() -> ConfigDict:
    """Returns one pass over the training images, as they are; nothing of `optimizer` is used."""
    config = default.get_config()
    config.num_epochs = 1.0
    config.batch_size = 64
    config.model.name = "mqdf"
    config.data.aspect = "adaptive"
    return config
