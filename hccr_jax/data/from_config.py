"""The splits that a config names."""

import dataclasses

from ml_collections import ConfigDict

from hccr_jax.data.label_noise import shuffle_labels
from hccr_jax.data.prepare import prepare_synthetic
from hccr_jax.data.splits import Split, join_splits, load_split


def dataset_name(config: ConfigDict) -> str:
    """Returns the data set's name; makes the synthetic one if it is selected."""
    data = config.data
    return (
        prepare_synthetic(data.data_dir, **data.synthetic)
        if data.name == "synthetic"
        else data.name
    )


def load(config: ConfigDict, split: str) -> Split:
    """Returns a split in normal form."""
    data, name = config.data, dataset_name(config)
    return load_split(name, data.data_dir, split, data.image_px, data.margin_px, data.aspect)


def load_training(config: ConfigDict) -> Split:
    """Returns the training split, with label noise and simulated writers as configured."""
    data = config.data
    train = load(config, data.train_split)
    if data.label_noise > 0.0:
        labels = shuffle_labels(train.labels, data.label_noise, len(train.classes), config.seed)
        train = dataclasses.replace(train, labels=labels)
    if data.mix_synthetic:
        name = prepare_synthetic(data.data_dir, **data.synthetic)
        form = data.image_px, data.margin_px, data.aspect
        train = join_splits(train, load_split(name, data.data_dir, "train", *form))
    return train
