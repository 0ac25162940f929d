"""The paper's experiments (its sections 5 and 6), short, on the real subset of 100 characters.

  hccr sweep --config=configs/experiments/paper.py --data_dir=DIR \
    --output=docs/measured/paper.jsonl

One alone: `hccr train --config=experiments/paper:rate_0005`.
"""

from typing import Any

from ml_collections import ConfigDict

from hccr_jax.configs import v2

WIDTH = 0.5
EPOCHS = 8.0

# Batch-norm statistics are computed again before each evaluation, except in the last group, which
# evaluates one training with different statistics: they play no part in it. It trains fast, without
# augmentation, so that the weights move much between two validations. The paper's momentum, 0.9997,
# looks back over 3,333 steps, an epoch of its data; here 0.99 looks back over 100, 0.6 epochs.
NAMES = {
    "baseline": "baseline: flips and rotation drawn in every epoch, batch-norm statistics "
    "re-estimated",
    "Augmentation stored": {
        "once": "drawn once for each image and stored",
        "none": "no augmentation",
    },
    "Operations left out by the paper": {
        "transposition": "with transposition",
        "crop": "with crop",
        "colour": "with contrast and brightness",
        "noise": "with Gaussian noise",
        "everything": "with all four",
    },
    "Learning rate": {
        "rate_01": "learning rate 0.01",
        "rate_01_none": "learning rate 0.01, no augmentation",
        "rate_0005": "learning rate 0.0005",
    },
    "Dropout": {
        "keep_97": "keep 0.97",
        "keep_75": "keep 0.75",
        "keep_55": "keep 0.55",
    },
    "Resize": {"resize": "with resize"},
    "Collapse": {
        "retaken": "statistics re-estimated before each validation",
        "average_9997": "plain averages, momentum 0.9997",
        "average_99": "plain averages, momentum 0.99",
        "average_9": "plain averages, momentum 0.9",
        "annealed": "plain averages, momentum 0.99, learning rate annealed to 0",
    },
}

_UNAUGMENTED = {
    "augment.flip_left_right_prob": 0.0,
    "augment.flip_up_down_prob": 0.0,
    "augment.rotate_deg": 0.0,
}
_TRANSPOSITION = {"augment.transpose_prob": 0.5}
_CROP = {"augment.crop_min": 0.7}
_COLOUR = {"augment.contrast": 0.5, "augment.brightness": 0.25}
_NOISE = {"augment.noise_std": 0.1}
_FAST = _UNAUGMENTED | {"optimizer.learning_rate": 0.01, "eval.every_steps": 42}
_PLAIN = _FAST | {
    "model.batch_norm_ramp": False,
    "model.batch_norm_momentum": 0.99,
    "eval.batch_norm_batches": 0,
}
_CHANGES: dict[str, dict[str, Any]] = {
    "baseline": {},
    "once": {"augment.once": True},
    "none": _UNAUGMENTED,
    "transposition": _TRANSPOSITION,
    "crop": _CROP,
    "colour": _COLOUR,
    "noise": _NOISE,
    "everything": _TRANSPOSITION | _CROP | _COLOUR | _NOISE,
    "rate_01": {"optimizer.learning_rate": 0.01},
    "rate_01_none": _UNAUGMENTED | {"optimizer.learning_rate": 0.01},
    "rate_0005": {"optimizer.learning_rate": 0.0005},
    "keep_97": {"model.dropout_rate": 0.03},
    "keep_75": {"model.dropout_rate": 0.25},
    "keep_55": {"model.dropout_rate": 0.45},
    "resize": {"augment.resize_min": 0.5, "augment.resize_max": 2.5},
    "retaken": _FAST,
    "average_9997": _PLAIN | {"model.batch_norm_momentum": 0.9997},
    "average_99": _PLAIN,
    "average_9": _PLAIN | {"model.batch_norm_momentum": 0.9},
    "annealed": _PLAIN | {"optimizer.schedule": "cosine"},
}


def get_config(name: str) -> ConfigDict:
    """Returns the config of an experiment."""
    config = v2.get_config()
    config.num_steps = 0
    config.num_epochs = EPOCHS
    config.batch_size = 128
    config.model.width = WIDTH
    config.augment.resize_min = 1.0
    config.augment.resize_max = 1.0
    config.update_from_flattened_dict(_CHANGES[name])
    return config
