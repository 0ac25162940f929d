"""The classical recogniser on the real subset of CASIA-HWDB1.1: features, LDA and MQDF.

  python -m hccr_jax.main --config=configs/mqdf.py --config.data.data_dir=DIR

Measured on 2 cores (AMD EPYC with AVX-512, float32, shared with other work), the data prepared: 16
s, 7 of them for the fit; test top-1 93.07 %, top-5 98.88 % (5,973 characters of 60 writers);
validation top-1 91.26 % (24 writers), on which the settings were chosen. With the plain normal form
(--config.data.aspect=keep): test 93.00 %, 99.03 %; validation 90.96 %. 560,689 parameters, 0.9
million multiply-adds for an image. With 3,755 classes such a system reaches 89.55 % on HWDB1.1 (Liu
et al., 2013, with a nonlinear normal form).
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """Returns one pass over the training images, as they are; nothing of `optimizer` is used."""
    config = default.get_config()
    config.num_epochs = 1.0
    config.batch_size = 64
    config.model.name = "mqdf"
    config.data.aspect = "adaptive"
    return config
