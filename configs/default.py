"""Every key with its default and its range; other configs override what differs.

A new key is a line of `get_config`, and a line of `LIMITS` where its type is not enough.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the default config: MobileNetV2 with no augmentation on prepared CASIA-HWDB1.1."""
    config = ConfigDict()
    config.seed = 0
    # The length of the run: one is positive, the other 0.
    config.num_steps = 0
    config.num_epochs = 0.0
    # A run, or its folder checkpoints, whose best weights are the initial ones; "" for none. The
    # last layer is taken over character by character.
    config.init_from = ""
    config.batch_size = 256  # over all devices
    # Microbatches of a batch, one after the other, where it does not fit in memory at once; each
    # has batch-norm statistics of its own.
    config.gradient_accumulation_steps = 1
    config.steps_per_execution = 0  # of the compiled program; 0: 1 on a CPU, 50 on accelerators
    config.log_every_steps = 50
    # A step that takes longer is considered stuck, and ends the run with the stacks of all threads;
    # compiling, an evaluation and a save may take ten times as long. 0: no watchdog.
    config.watchdog_seconds = 300.0
    # Skips a batch whose loss or gradient is not finite, instead of ending the run.
    config.skip_non_finite = False
    # The same bits on any number of devices that divides 8: the batch is computed in 8 shards, each
    # with batch-norm statistics of its own.
    config.strict_determinism = False
    config.reduce_dtype = "float32"  # or "bfloat16": in which devices add up gradients

    config.model = ConfigDict()
    config.model.name = "mobilenet_v2"
    config.model.width = 1.0
    config.model.stem_stride = 2  # 1: maps of twice the side, four times the arithmetic
    config.model.first_stride = 2  # 1: every map but the first of twice the side
    config.model.head_channels = 1280  # of MobileNetV2's last convolution
    config.model.dropout_rate = 0.0
    # Statistics of the whole batch ("global") or of each device's rows alone ("local"). "auto":
    # local on several devices with at least 64 rows each.
    config.model.batch_norm = "auto"
    config.model.batch_norm_epsilon = 1e-3
    config.model.batch_norm_momentum = 0.99
    config.model.batch_norm_ramp = True  # the averages forget their start; False: momentum alone
    # Of the classical recogniser, mqdf:
    config.model.lda_dims = 160  # at most one less than there are classes
    config.model.eigenvectors = 50  # of each class
    config.model.minor_variance = 0.65  # in all other directions; the mean variance is 1
    # Above 0 a network is ensembled with mqdf: their log-probabilities are added, those of mqdf
    # times this. It is fitted to the training images before the training.
    config.model.mqdf_weight = 0.0
    config.model.dtype = "auto"  # bfloat16 on accelerators, float32 on a CPU

    config.data = ConfigDict()
    config.data.name = "casia_hwdb"  # or "synthetic", made on first use
    config.data.data_dir = "data"
    config.data.image_px = 64
    config.data.margin_px = 4  # free at each border
    config.data.aspect = "keep"  # or "adaptive": elongated characters become nearer to square
    # The training split is read ahead on the host ("stream") or stored in the memory of every
    # device ("device"); the batches are the same. "auto": on accelerators if it takes at most half.
    config.data.placement = "auto"
    config.data.train_split = "train"  # "train+validation": all writers, once all is chosen
    config.data.validation_split = "validation"  # a tenth of the training writers: to choose on
    config.data.test_split = "test"  # to report on, once
    # This fraction of the training labels, at random, is made wrong, to measure what that costs.
    config.data.label_noise = 0.0
    # Trains on simulated writers too, on those of their characters that the data set has.
    config.data.mix_synthetic = False
    config.data.strokes = ConfigDict()  # its name in 0.1, so that configs can set keys of it
    config.data.synthetic = ConfigDict()
    config.data.synthetic.num_characters = 3755  # the first ones in Unicode order
    config.data.synthetic.num_train_writers = 240
    config.data.synthetic.num_test_writers = 60
    config.data.synthetic.cursiveness = 1.0  # as hurried as CASIA's writers; less is neater

    config.augment = ConfigDict()
    config.augment.flip_left_right_prob = 0.0
    config.augment.flip_up_down_prob = 0.0
    config.augment.rotate_prob = 1.0
    config.augment.rotate_deg = 0.0
    config.augment.resize_prob = 1.0
    config.augment.resize_min = 1.0
    config.augment.resize_max = 1.0
    config.augment.zoom = 0.0
    config.augment.shear = 0.0
    config.augment.shift_px = 0.0
    config.augment.elastic_px = 0.0
    config.augment.stroke_width = 0.0
    config.augment.erase_prob = 0.0
    config.augment.erase_max_side = 0.3
    config.augment.noise_std = 0.0
    config.augment.transpose_prob = 0.0
    config.augment.crop_min = 1.0
    config.augment.contrast = 0.0
    config.augment.brightness = 0.0
    config.augment.once = False  # drawn once for each training image, not again in each epoch

    config.loss = ConfigDict()
    config.loss.label_smoothing = 0.0
    # Above 0, labels that the network rules out have little weight: wrong ones, crossed-out
    # characters.
    config.loss.noise_rate = 0.0
    # The target of mirrored images is uniform: with `eval.tta_flips` the view counts in which the
    # network is certain. Otherwise they keep their character's label.
    config.loss.mirrored_as_uniform = False

    # A run, or its folder checkpoints, whose network is a teacher: its logits for the same
    # augmented images are a target besides the labels. "" for none.
    config.teacher = ConfigDict()
    config.teacher.checkpoint = ""
    # Its logits are computed before the training, for the images as they are, in its own normal
    # form: no step takes longer, but each image needs two more bytes of memory per class.
    config.teacher.precompute = False
    config.teacher.weight = 0.5  # of the distillation loss
    config.teacher.temperature = 1.0

    config.optimizer = ConfigDict()
    config.optimizer.name = "adam"  # or "adamw", "muon", "sgd"
    config.optimizer.learning_rate = 1e-3
    # "sqrt": learning rates are multiplied by √(batch_size / reference_batch_size), which suits
    # Adam (https://arxiv.org/abs/2205.10287).
    config.optimizer.batch_rule = "none"
    config.optimizer.reference_batch_size = 256
    config.optimizer.schedule = "exponential"
    config.optimizer.warmup_epochs = 0.0
    config.optimizer.decay_rate = 0.94
    config.optimizer.decay_epochs = 2.5
    config.optimizer.staircase = True
    config.optimizer.end_learning_rate = 0.0  # of the cosine
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 0.0  # 0: no clipping
    # Decay of the moving average of the weights that evaluations use. 0: none.
    config.optimizer.average_decay = 0.0

    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 1000
    config.checkpoint.keep_latest = 2
    config.checkpoint.keep_best = 1

    config.eval = ConfigDict()
    config.eval.every_steps = 0  # 0: once an epoch
    config.eval.batch_size = 256  # images, or views of them
    # Test-time augmentation: the number of slight rotations and zooms, and whether each is also
    # mirrored. Probabilities are averaged, weighted by certainty; each view costs a forward pass.
    config.eval.tta_views = 1
    config.eval.tta_flips = False
    config.eval.upright_prior = 0.25  # probability that an image is not mirrored
    # Before an evaluation, batch-norm statistics are computed from this many training batches with
    # the current weights: running averages lag behind weights that change fast, and accuracy then
    # swings by tens of points. 0: the running averages.
    config.eval.batch_norm_batches = 20
    # The final evaluation includes distorted test images: the paper's sets of rotated, flipped and
    # resized ones and curves against the angle and the aspect (`robustness`); and the test split as
    # the authors' own script has it, every image flipped and rotated at random (`paper_protocol`).
    config.eval.robustness = False
    config.eval.robustness_images = 3000  # in each set; 0: the whole split
    config.eval.paper_protocol = False
    # Number of training characters to list that are most likely miswritten or wrongly labelled.
    config.eval.label_errors = 0
    # Number of validation characters, and as many crossed out, to fit a rejector to, and of test
    # characters to test it on. 0: no rejector.
    config.eval.rejection_images = 2000
    return config


PATHS = ("data.data_dir", "init_from", "teacher.checkpoint")  # keys that may begin with ~

# Ranges (low, high) of numbers and allowed words, for keys whose default's type is not enough. No
# number is negative.
_INFINITY = float("inf")
_POSITIVE = (1, _INFINITY)
_FRACTION = (0, 1)
_BELOW_ONE = (0, 0.99)
_DECAY = (0, 0.999999)
_TINY = 1e-12
LIMITS = {
    "seed": (0, 2**31 - 1),
    "batch_size": _POSITIVE,
    "gradient_accumulation_steps": _POSITIVE,
    "steps_per_execution": (0, 10_000),
    "log_every_steps": _POSITIVE,
    "watchdog_seconds": (0, 1e6),
    "reduce_dtype": ("float32", "bfloat16"),
    "model.width": (0.05, 8),
    "model.stem_stride": (1, 2),
    "model.first_stride": (1, 2),
    "model.head_channels": (8, 65_536),
    "model.dropout_rate": _BELOW_ONE,
    "model.batch_norm_epsilon": (_TINY, 1),
    "model.batch_norm": ("auto", "global", "local"),
    "model.batch_norm_momentum": _DECAY,
    "model.lda_dims": (1, 512),
    "model.eigenvectors": (1, 512),
    "model.minor_variance": (1e-6, 1000),
    "model.mqdf_weight": (0, 100),
    "model.dtype": ("auto", "float32", "bfloat16"),
    "data.image_px": (16, 512),
    "data.margin_px": (0, 255),
    "data.aspect": ("keep", "adaptive"),
    "data.placement": ("auto", "stream", "device"),
    "data.label_noise": _FRACTION,
    "data.synthetic.num_characters": (2, 3755),
    "data.synthetic.num_train_writers": (2, 100_000),
    "data.synthetic.num_test_writers": (1, 100_000),
    "data.synthetic.cursiveness": _FRACTION,
    "augment.flip_left_right_prob": _FRACTION,
    "augment.flip_up_down_prob": _FRACTION,
    "augment.rotate_prob": _FRACTION,
    "augment.rotate_deg": (0, 180),
    "augment.resize_prob": _FRACTION,
    "augment.resize_min": (0.05, 20),
    "augment.resize_max": (0.05, 20),
    "augment.zoom": (0, 0.9),
    "augment.shear": (0, 2),
    "augment.shift_px": (0, 256),
    "augment.elastic_px": (0, 64),
    "augment.stroke_width": _FRACTION,
    "augment.erase_prob": _FRACTION,
    "augment.erase_max_side": (0.05, 1),
    "augment.noise_std": _FRACTION,
    "augment.transpose_prob": _FRACTION,
    "augment.crop_min": (0.05, 1),
    "augment.contrast": _FRACTION,
    "augment.brightness": _FRACTION,
    "loss.label_smoothing": _BELOW_ONE,
    "loss.noise_rate": _BELOW_ONE,
    "teacher.weight": _FRACTION,
    "teacher.temperature": (0.1, 100),
    "optimizer.name": ("adam", "adamw", "muon", "sgd"),
    "optimizer.learning_rate": (_TINY, 1000),
    "optimizer.batch_rule": ("none", "sqrt"),
    "optimizer.reference_batch_size": _POSITIVE,
    "optimizer.schedule": ("exponential", "cosine", "constant"),
    "optimizer.decay_rate": (_TINY, 1),
    "optimizer.decay_epochs": (_TINY, _INFINITY),
    "optimizer.end_learning_rate": (0, 1000),
    "optimizer.weight_decay": (0, 10),
    "optimizer.average_decay": _DECAY,
    "checkpoint.every_steps": _POSITIVE,
    "checkpoint.keep_latest": _POSITIVE,
    "checkpoint.keep_best": _POSITIVE,
    "eval.batch_size": _POSITIVE,
    "eval.tta_views": (1, 5),
    "eval.upright_prior": _FRACTION,
    "eval.batch_norm_batches": (0, 100_000),
    "eval.label_errors": (0, 10_000),
    "eval.rejection_images": (0, 100_000),
}
