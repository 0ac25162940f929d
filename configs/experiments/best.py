"""The best recipes and the paper's in full, on the real subset of 100 characters.

  hccr sweep --config=configs/experiments/best.py --data_dir=DIR \
    --output=docs/measured/best.jsonl
"""

import importlib

from ml_collections import ConfigDict

NAMES = {
    "paper": "the paper's recipe with resize augmentation, 20 epochs of batch 128",
    "v2_best": "`v2_best`",
    "v2_robust": "`v2_robust`, from `v2_best`",
    "v1_best": "`v1_best`",
    "v1_shuffled": "`v1_best`, 10 % of the training labels shuffled",
    "teacher": "`teacher`: ResNet-18, on one H200",
    "v2_distilled": "`v2_distilled`, from `teacher`",
}
_CONFIGS = {"paper": "v2", "v1_shuffled": "v1_best"}


def get_config(name: str) -> ConfigDict:
    """Returns the config of an experiment."""
    config = importlib.import_module(f"hccr_jax.configs.{_CONFIGS.get(name, name)}").get_config()
    if name == "paper":
        config.num_steps = 0
        config.num_epochs = 20.0
        config.batch_size = 128
        config.eval.robustness = True
        config.eval.paper_protocol = True
    if name == "v1_shuffled":
        config.data.label_noise = 0.1
        config.eval.label_errors = 100
    if name == "v2_robust":
        config.init_from = "runs/best/v2_best-seed0"
    if name == "v2_distilled":
        config.teacher.checkpoint = "runs/best/teacher-seed0"
    return config
