"""The embedded data set, 100 characters, in minutes on two CPU cores."""

from ml_collections import ConfigDict

from configs import hwdb100


def get_config() -> ConfigDict:
    """Returns a short run of a narrow MobileNetV2 on simulated writers."""
    config = hwdb100.get_config()
    config.num_epochs = 5.0
    config.log_every_steps = 20
    config.model.width = 0.5
    config.data.name = "strokes"
    config.data.strokes.num_characters = 100
    config.data.strokes.num_train_writers = 110
    config.data.strokes.num_test_writers = 30
    return config
