"""Every system the paper names, trained the same way on the real subset of 100 characters.

  hccr sweep --config=configs/experiments/systems.py --data_dir=DIR \
    --output=docs/measured/systems.jsonl
"""

import importlib

from ml_collections import ConfigDict

EPOCHS = 2.0

NAMES = {
    "mqdf": "MQDF: gradient directions, LDA, modified quadratic discriminant",
    "lenet5": "LeNet-5",
    "alexnet": "AlexNet",
    "resnet18": "ResNet-18",
    "resnet34": "ResNet-34",
    "resnet50": "ResNet-50",
    "v1": "MobileNet V1",
    "v2": "MobileNet V2",
}
_CONFIGS = {"v1": "hwdb100", "v2": "hwdb100"}


def get_config(name: str) -> ConfigDict:
    """Returns the config of an experiment."""
    config = importlib.import_module(f"hccr_jax.configs.{_CONFIGS.get(name, name)}").get_config()
    if name == "v1":
        config.model.name = "mobilenet_v1"
    if name != "mqdf":
        config.num_epochs = EPOCHS
    config.eval.robustness = True
    return config
