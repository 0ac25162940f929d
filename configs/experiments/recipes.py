"""What each part of a recipe is worth on the real subset of 100 characters: short runs.

  hccr train --config=hwdb100 --config.data.data_dir=DIR
  hccr train --config=synthetic --workdir=runs/strokes_half \
    --config.model.width=0.5 --config.model.stem_stride=2
  hccr sweep --config=configs/experiments/recipes.py --data_dir=DIR \
    --output=docs/measured/recipes.jsonl

Each experiment changes one thing in `configs/hwdb100.py` at half its width and 6 epochs. Choose by
the validation writers: the test split is there to report on.
"""

from typing import Any

from ml_collections import ConfigDict

from hccr_jax.configs import hwdb100

EPOCHS = 6.0
WIDTH = 0.5

NAMES = {
    "baseline": "baseline: AdamW, cosine, mild geometry, erasing, label smoothing",
    "Optimiser": {
        "adam_staircase": "the paper's: Adam 1e-3, staircase, no weight decay",
        "no_warmup": "no warm-up",
        "no_decay": "no weight decay",
        "rate_half": "half the learning rate, 1e-3",
        "rate_double": "twice the learning rate, 4e-3",
        "rate_fivefold": "five times the learning rate, 1e-2",
        "muon": "Muon, learning rate 1e-2, weight decay 0.01",
        "batch_64": "batch 64",
        "average": "moving average of the weights, 0.998",
    },
    "Loss": {
        "no_smoothing": "no label smoothing",
        "noise_rate": "loss that bears wrong labels, noise rate 0.5",
        "teacher": "distillation from hwdb100 in full",
        "teacher_once": "distillation from hwdb100 in full, logits precomputed",
        "no_dropout": "no dropout",
    },
    "Augmentation": {
        "no_augmentation": "no augmentation",
        "paper_geometry": "the paper's geometry: flips, ±30°, resize 0.5 to 2.5",
        "half_geometry": "half the geometry",
        "no_erasing": "no erasing",
        "elastic": "elastic deformation, 1.5 px",
        "stroke_width": "stroke width changed by up to half a pixel",
    },
    "Input": {
        "adaptive": "aspect-ratio adaptive normal form",
        "larger_input": "96 px",
    },
    "Network": {
        "stem_stride_1": "stem of stride 1",
        "first_stride_1": "first stride 1",
        "width_100": "width 1",
        "width_035": "width 0.35",
        "narrow_head": "head of 576 channels",
        "wide_head": "head of 2,048 channels",
        "v1": "MobileNet V1",
    },
    "Start and test": {
        "strokes": "starting from simulated writers",
        "strokes_adaptive": "starting from simulated writers, adaptive normal form",
        "mix": "simulated writers among the training data",
        "views": "five views at test time",
        "mqdf": "ensembled with MQDF",
    },
}

_CHANGES: dict[str, dict[str, Any]] = {
    "baseline": {},
    "adam_staircase": {
        "optimizer.name": "adam",
        "optimizer.learning_rate": 1e-3,
        "optimizer.schedule": "exponential",
        "optimizer.warmup_epochs": 0.0,
        "optimizer.weight_decay": 0.0,
        "optimizer.clip_norm": 0.0,
    },
    "no_warmup": {"optimizer.warmup_epochs": 0.0},
    "no_decay": {"optimizer.weight_decay": 0.0},
    "rate_half": {"optimizer.learning_rate": 1e-3},
    "rate_double": {"optimizer.learning_rate": 4e-3},
    "rate_fivefold": {"optimizer.learning_rate": 1e-2},
    "muon": {
        "optimizer.name": "muon",
        "optimizer.learning_rate": 1e-2,
        "optimizer.weight_decay": 0.01,
    },
    "batch_64": {"batch_size": 64},
    "average": {"optimizer.average_decay": 0.998},
    "no_smoothing": {"loss.label_smoothing": 0.0},
    "noise_rate": {"loss.noise_rate": 0.5},
    "teacher": {"teacher.checkpoint": "runs/hwdb100"},  # it has not seen the validation writers
    "teacher_once": {"teacher.checkpoint": "runs/hwdb100", "teacher.precompute": True},
    "no_dropout": {"model.dropout_rate": 0.0},
    "no_augmentation": {
        "augment.rotate_deg": 0.0,
        "augment.zoom": 0.0,
        "augment.shear": 0.0,
        "augment.shift_px": 0.0,
        "augment.resize_min": 1.0,
        "augment.resize_max": 1.0,
        "augment.erase_prob": 0.0,
    },
    "paper_geometry": {
        "augment.flip_left_right_prob": 0.5,
        "augment.flip_up_down_prob": 0.5,
        "augment.rotate_deg": 30.0,
        "augment.resize_min": 0.5,
        "augment.resize_max": 2.5,
    },
    "half_geometry": {
        "augment.rotate_deg": 5.0,
        "augment.zoom": 0.075,
        "augment.shear": 0.075,
        "augment.shift_px": 1.5,
        "augment.resize_min": 0.925,
        "augment.resize_max": 1.075,
    },
    "no_erasing": {"augment.erase_prob": 0.0},
    "elastic": {"augment.elastic_px": 1.5},
    "stroke_width": {"augment.stroke_width": 0.5},
    "adaptive": {"data.aspect": "adaptive"},
    "larger_input": {"data.image_px": 96, "data.margin_px": 6},
    "stem_stride_1": {"model.stem_stride": 1},
    "first_stride_1": {"model.first_stride": 1},
    "width_100": {"model.width": 1.0},
    "width_035": {"model.width": 0.35},
    "narrow_head": {"model.head_channels": 576},
    "wide_head": {"model.head_channels": 2048},
    "v1": {"model.name": "mobilenet_v1"},
    "strokes": {"init_from": "runs/strokes_half"},
    "strokes_adaptive": {"init_from": "runs/strokes_half", "data.aspect": "adaptive"},
    "mix": {
        "data.mix_synthetic": True,
        "data.synthetic.num_train_writers": 160,
        "data.synthetic.num_test_writers": 4,
    },
    "views": {"eval.tta_views": 5},
    "mqdf": {"model.mqdf_weight": 0.5},
}


def get_config(name: str) -> ConfigDict:
    """Returns the config of an experiment."""
    config = hwdb100.get_config()
    config.num_epochs = EPOCHS
    config.model.width = WIDTH
    config.update_from_flattened_dict(_CHANGES[name])
    return config
