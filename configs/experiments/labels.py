"""Wrong labels: a part of the training labels shuffled, with and without the loss that bears them.

  hccr train --config=synthetic --workdir=runs/strokes_hwdb100 \
    --config.model.width=1.0 --config.model.stem_stride=2 --config.num_steps=5500
  hccr sweep --config=configs/experiments/labels.py --data_dir=DIR \
    --output=docs/measured/labels.jsonl
"""

from ml_collections import ConfigDict

from hccr_jax.configs import hwdb100

EPOCHS = 10.0
NOISE_RATE = 0.5

NAMES = {
    "clean": "clean labels",
    "clean_borne": "clean labels, noise rate 0.5",
    "noise_05": "5 % shuffled",
    "noise_05_borne": "5 % shuffled, noise rate 0.5",
    "noise_10": "10 % shuffled",
    "noise_10_borne": "10 % shuffled, noise rate 0.5",
}


def get_config(name: str) -> ConfigDict:
    """Returns the config of an experiment."""
    config = hwdb100.get_config()
    config.num_epochs = EPOCHS
    config.data.aspect = "adaptive"
    config.init_from = "runs/strokes_hwdb100"
    config.data.label_noise = 0.0 if name.startswith("clean") else int(name[6:8]) / 100
    config.loss.noise_rate = NOISE_RATE if name.endswith("_borne") else 0.0
    config.eval.label_errors = 100
    return config
