"""The sections of a recipe: every key, its type, its bounds and its default."""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from bdkd_dist.objectives import OBJECTIVES, student_names


class Section(BaseModel):
    """A part of a recipe: unknown keys are refused, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Augmentation(Section):
    """Random crop and flip of training images; each draw is a function of (seed, epoch, sample index)."""

    crop: Literal["none", "pad", "resized"] = "pad"
    """``pad``: zero border of ``pad_px``, then a crop of the image's size; ``resized``: a box of random area and
    aspect ratio (Inception's), resized; ``none``: the evaluation crop."""
    pad_px: int = Field(4, ge=0, le=64)
    """Width of that border, in pixels of the training images."""
    min_area: float = Field(0.08, gt=0, le=1)
    """Boxes of ``resized`` have an area of at least this share of the image's, uniform up to all of it."""
    max_aspect: float = Field(4 / 3, ge=1)
    """Boxes of ``resized`` have an aspect ratio in [1/max_aspect, max_aspect], uniform in its logarithm."""
    flip: bool = True
    """Mirror left and right with probability ½."""
    brightness: float = Field(0.0, ge=0, le=1)
    """Colour jitter (torchvision's ``ColorJitter``): multiply by a factor uniform in [1 - x, 1 + x]."""
    contrast: float = Field(0.0, ge=0, le=1)
    """Blend with the mean grey by such a factor."""
    saturation: float = Field(0.0, ge=0, le=1)
    """Blend with the image's own grey by such a factor."""
    hue: float = Field(0.0, ge=0, le=0.5)
    """Shift of the hue, uniform in [-x, x] of the whole circle."""
    rand_ops: int = Field(0, ge=0, le=8)
    """RandAugment (Cubuk et al. 2020): so many operations a sample, drawn from its set; 0 is none."""
    rand_magnitude: int = Field(9, ge=0, le=30)
    """How strong RandAugment's operations are, on torchvision's scale."""
    cutout_px: int = Field(0, ge=0, le=1024)
    """Side of a square with its centre anywhere in the image that takes the mean colour (DeVries and Taylor 2017)."""
    mixup_alpha: float = Field(0.0, ge=0)
    """Mix each image and its target with its partner's by a share from Beta(α, α) (Zhang et al. 2018); 0 is none."""
    cutmix_alpha: float = Field(0.0, ge=0)
    """Paste a box of the partner's image whose area is a share from Beta(α, α) (Yun et al. 2019); 0 is none. With
    both, a coin decides for each sample."""


class Resize(Section):
    """Progressive resizing: training images grow from ``start_px`` to ``end_px`` between two epochs."""

    start_px: int = Field(ge=8, le=1024)
    """Side of the training images at first."""
    end_px: int = Field(ge=8, le=1024)
    """Side of the training images at last; between the two epochs it follows a straight line."""
    from_epoch: int = Field(0, ge=0)
    """Epoch, counted from 0, up to which the side is ``start_px``."""
    to_epoch: int = Field(ge=1)
    """Epoch from which on it is ``end_px``; at most ``train.epochs``."""
    multiple_px: int = Field(32, ge=1)
    """Sizes are rounded to multiples of this."""

    @model_validator(mode="after")
    def _rises(self) -> "Resize":
        if self.to_epoch <= self.from_epoch:
            raise ValueError(f"to_epoch={self.to_epoch} must come after from_epoch={self.from_epoch}")
        for key in ("start_px", "end_px"):
            if getattr(self, key) % self.multiple_px:
                raise ValueError(f"{key}={getattr(self, key)} is no multiple of multiple_px={self.multiple_px}")
        return self


class Data(Section):
    """Where images come from and how they reach the networks."""

    dataset: Literal["digits", "cifar10", "cifar100", "files"]
    """``digits`` ships inside scikit-learn; ``cifar10`` and ``cifar100`` come from ``root`` or by ``download``;
    ``files`` are the user's own under ``root``."""
    root: str | None = Field(None, min_length=1)
    """A data set that ``bdkd prepare`` made, a folder of Parquet shards or of tars, or an image folder
    ``train/<class>/…``, as a path or a URI (``s3://…``, ``gs://…``; what ``bdkd prepare`` made needs another ``stage``
    than ``shared`` there). For CIFAR also the folder that holds torchvision's."""
    download: bool = False
    """Let torchvision fetch CIFAR (needs a network)."""
    num_classes: int = Field(ge=2)
    """As many as the data set has."""
    image_px: int = Field(ge=8, le=1024)
    """Side of the square images that the networks see."""
    eval_crop: float = Field(1.0, gt=0, le=1)
    """Side of the centred evaluation crop as a share of the image's shorter side (224/256 = 0.875 is usual)."""
    max_side_px: int = Field(512, ge=16)
    """Stored images have no longer side than this; smaller JPEGs keep their original bytes. Not read where ``root`` was
    made by ``bdkd prepare``, which has options of its own."""
    jpeg_quality: int = Field(90, ge=1, le=100)
    """Of images that have to be encoded anew to be stored. Not read where ``root`` was made by ``bdkd prepare``."""
    validation_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of the training images held out, class by class, where the source has no validation split, or none beside
    the one that serves as its test split."""
    train_limit: int | None = Field(None, ge=1)
    """Train on only this many images, drawn class by class (validation and test stay whole)."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Of pixels scaled to [0, 1], per RGB channel; it is subtracted before the networks see them."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of such pixels, by which they are divided."""
    augment: Augmentation = Augmentation()
    resize: Resize | None = None
    """Train on smaller images at first; evaluation is at ``image_px`` throughout."""
    order: Literal["random", "quasi_random"] = "random"
    """``quasi_random``: for sets larger than memory; few pages of the files are in use at once (see docs/data.md)."""
    loader: Literal["auto", "ffcv", "torch", "resident"] = "auto"
    """``auto``: ``ffcv`` where the native decoder or FFCV is there, else torch's DataLoader; ``resident``: all images
    stay on the device as uint8 (small sets of images of one size). All give the same batches."""
    threads: int | None = Field(None, ge=1)
    """Decoding threads (FFCV) or processes (torch) per worker; by default the worker's share of the cores, in a search
    ``launch.cpus_per_worker``."""
    prepared: str = "~/.cache/bdkd-dist"
    """Where data sets that were prepared on the way are kept and shared by runs."""
    stage: Literal["shared", "local", "memory"] = "shared"
    """Read prepared files where they lie (``shared``), or from a copy that the workers of a node share: on its own disk
    (``local``) or in its memory (``memory``)."""
    stage_folder: str | None = Field(None, min_length=1)
    """Where copies are kept; by default a folder of the user's in the node's temporary folder or in ``/dev/shm``."""
    cache: Literal["os", "process"] = "os"
    """Who keeps pages of the files in memory: the operating system, or this process (needs
    ``order=quasi_random``; for file systems that are slow to map)."""

    @model_validator(mode="after")
    def _positive_std(self) -> "Data":
        if min(self.std) <= 0:
            raise ValueError("std must be positive in every channel")
        return self


class Models(Section):
    """Networks by name: those of :mod:`bdkd_dist.models`, torchvision's, or one's own as ``module:function``."""

    teacher: str
    """The teacher's network (docs/networks.md)."""
    student: str | None = None
    """The student's network; this or ``students`` is needed."""
    students: tuple[str, ...] = ()
    """Several students of one teacher, e.g. ``[resnet8,resnet20]``, in place of ``student``: they are called
    ``student_1``, ``student_2`` and so on."""
    teacher_checkpoint: str | None = Field(None, min_length=1)
    """Weights with which the teacher begins, by path or URI: a finished run (its newest checkpoint's teacher), one
    checkpoint file, or the file of a bare state dict. Objective ``kd`` needs it and leaves the teacher as it is."""

    @model_validator(mode="before")
    @classmethod
    def _one_spelling(cls, tree: Any) -> Any:
        """Several students stand in ``students``, a single one in ``student``."""
        if isinstance(tree, dict) and isinstance(several := tree.get("students"), list | tuple) and several:
            if tree.get("student") is not None:
                raise ValueError("student and students are both set; leave one of them out")
            return tree | {"student": several[0], "students": ()} if len(several) == 1 else tree
        return tree

    @model_validator(mode="after")
    def _has_a_student(self) -> "Models":
        if self.student is None and not self.students:
            raise ValueError("a student is missing; set models.student or models.students")
        return self

    @property
    def by_role(self) -> dict[str, str]:
        """Names of networks by the role under which they are trained, measured and recorded, the teacher first."""
        students = self.students or (self.student or "",)
        return {"teacher": self.teacher, **dict(zip(student_names(len(students)), students, strict=True))}


class Optimizer(Section):
    """SGD with momentum; each network has a parameter group of its own."""

    lr: float = Field(gt=0)
    """Learning rate of all networks, before the schedule's factor."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of SGD; 0 is none."""
    nesterov: bool = True
    """Nesterov's form of momentum."""
    weight_decay: float = Field(5e-4, ge=0)
    """L2 penalty (added to the gradient) on all parameters, those of batch norm and biases too."""
    clip_grad_norm: float | None = Field(None, gt=0)
    """Largest gradient norm, per network; longer gradients are scaled down to it."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> "Optimizer":
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum > 0; set optimizer.nesterov=false")
        return self


class Schedule(Section):
    """Learning rate over training, a pure function of the step."""

    kind: Literal["cosine", "step"] = "cosine"
    """``cosine`` falls to 0 at the end of the last epoch; ``step`` multiplies by ``gamma`` at each milestone."""
    warmup_epochs: float = Field(0.0, ge=0)
    """The rate rises to ``optimizer.lr`` in a straight line over so many epochs at first; parts of one are allowed."""
    milestones: tuple[int, ...] = ()
    """Epochs, counted from 0 and rising, at whose beginning ``step`` multiplies the rate; ``cosine`` does not read
    them."""
    gamma: float = Field(0.1, gt=0, lt=1)
    """Factor of ``step``."""

    @model_validator(mode="after")
    def _milestones_rise(self) -> "Schedule":
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError("milestones must rise")
        return self


class Train(Section):
    """The loop."""

    epochs: int = Field(ge=1)
    """Passes over the training images."""
    batch_size: int = Field(ge=2)
    """Images a step, over all workers; it stays what it is when their number changes."""
    micro_batch_size: int | None = Field(None, ge=8)
    """At most so many images on a worker at once: where its share of the batch is larger, gradients add up before the
    step (batch statistics are then those of the parts). For few workers with little memory."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Decides initial weights, order and augmentation; which images are held out does not depend on it."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Training targets of any objective become (1 - x)·y + x/K, after mixup and cutmix (Szegedy et al. 2016)."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast type of the networks (``fp16`` with a gradient scaler); losses are float32 in any case, and so are the
    networks when a run's results are measured."""
    batchnorm: Literal["sync", "local"] = "sync"
    """``sync``: statistics over the whole batch, so results do not depend on the number of workers; ``local``: over
    each worker's own images."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Keep a moving average of each student's weights (after every step, decay × average + (1 - decay) × weights),
    evaluated and exported beside it as ``student_ema``."""
    gradient_compression: Literal["none", "bf16"] = "none"
    """``bf16`` halves what workers send each other: gradients are rounded before they are added up."""
    compile: bool = False
    """Compile the networks and the objective; on a single GPU also replay each step as a CUDA graph (docs/gpu.md)."""
    gradient_shares: bool = False
    """Record each term's share of the gradient at the logits (one more pass through the objective a step).
    Not together with ``compile``."""
    evaluate_every_epochs: int = Field(1, ge=1)
    """Evaluate on the validation images after every so many epochs, and after the last."""
    log_every_steps: int = Field(20, ge=1)
    """Record the means of losses and diagnostics after every so many steps."""
    checkpoint_every_steps: int | None = Field(None, ge=1)
    """Checkpoint inside epochs too; the end of an epoch always has one."""


class Launch(Section):
    """Where a run runs, and how long it is waited for."""

    workers: int | tuple[int, int] = 1
    """1 trains in this process; N trains with N DDP workers under Ray Train; [min, max] with as many of them as the
    cluster has room for, and with more or fewer when nodes join or leave."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto``: GPUs where there are enough for all workers when the run starts, else the CPU."""
    cpus_per_worker: float = Field(1.0, gt=0)
    """Claimed from Ray. In a run a worker uses its share of its node's cores, whatever it claimed; a trial of a search
    uses only these."""
    gpus_per_worker: float = Field(1.0, gt=0)
    """Claimed from Ray where workers compute on GPUs; a part of one only where a run or a trial has one worker."""
    placement: Literal["pack", "spread"] = "pack"
    """Workers on as few nodes as possible, or on as many."""
    bucket_mib: float | None = Field(None, gt=0)
    """Gradients travel in buckets of this size while the rest of the backward pass goes on; by default DDP's own: a
    first one of 1 MiB, so that sending begins early, and then of 25 MiB."""
    max_failures: int = Field(3, ge=0)
    """How often lost workers start again from the newest checkpoint."""
    wait_timeout_s: float = Field(1800.0, gt=0)
    """Give up where the cluster has had no room for the workers for so long; the state is kept."""
    stall_timeout_s: float = Field(900.0, gt=0)
    """Start all workers again where none has finished a step for so long (the first may take an hour); their stacks are
    shown first."""

    @field_validator("workers", mode="before")
    @classmethod
    def _some_workers(cls, workers: Any) -> Any:
        if isinstance(workers, str) and workers.isdecimal():  # as a command line gives it
            workers = int(workers)
        bounds = list(workers) if isinstance(workers, list | tuple) else [workers, workers]
        if [type(bound) for bound in bounds] != [int, int] or not 1 <= bounds[0] <= bounds[1]:
            raise ValueError(f"{workers} is not allowed; a number from 1, or [min, max] with 1 <= min <= max")
        return bounds[0] if bounds[0] == bounds[1] else tuple(bounds)

    @property
    def min_workers(self) -> int:
        """Fewer than these do not train."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """More than these are not used."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class Run(Section):
    """The run folder: ``storage/name``."""

    name: str = Field(min_length=1, pattern=r"^[\w.+-]+$")
    """Of the run's folder in ``storage``: letters, digits and ``_.+-``. A recipe that sets none gives its own name."""
    storage: str = "runs"
    """A folder or a URI (docs/storage.md)."""


class Recipe(Section):
    """A complete run."""

    run: Run
    data: Data
    models: Models
    objective: Any = Field(default_factory=OBJECTIVES["bdkd"])
    """One of :data:`bdkd_dist.objectives.OBJECTIVES`, chosen by ``objective.name``."""
    optimizer: Optimizer
    schedule: Schedule = Schedule()
    train: Train
    launch: Launch = Launch()

    @model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        workers, batch = self.launch.max_workers, self.train.batch_size
        objective, students = self.objective, len(self.models.by_role) - 1
        if not objective.teacher_learns and self.models.teacher_checkpoint is None:
            raise ValueError(
                f"objective.name={objective.name} learns from a finished teacher; set models.teacher_checkpoint to the "
                "run folder of one, e.g. of a run with objective.name=ce"
            )
        if objective.max_students is not None and students > objective.max_students:
            raise ValueError(
                f"objective.name={objective.name} takes {objective.max_students} student, models.students names "
                f"{students}"
            )
        mixed = [key for key in ("mixup_alpha", "cutmix_alpha") if getattr(self.data.augment, key)]
        if objective.uses_past and mixed:
            raise ValueError(
                f"objective.name={objective.name} learns from what a network said of the same image before, and "
                f"data.augment.{mixed[0]} mixes images; set data.augment.{mixed[0]}=0"
            )
        if self.train.compile and self.train.gradient_shares:
            raise ValueError("train.gradient_shares does not go with train.compile; leave one of them out")
        launch = self.launch
        if workers > 1 and launch.gpus_per_worker < 1 and launch.device != "cpu":
            raise ValueError(
                f"launch.gpus_per_worker={launch.gpus_per_worker:g} with launch.workers={workers}: workers that share "
                "a GPU cannot exchange gradients (NCCL refuses); give 1 or more"
            )
        if batch < 2 * workers:
            raise ValueError(f"train.batch_size={batch} is less than two images for each of launch.workers={workers}")
        if self.data.cache == "process" and self.data.order != "quasi_random":
            raise ValueError(
                f"data.cache=process needs data.order=quasi_random: data.order={self.data.order} uses all pages at once"
            )
        if self.data.cache == "process" and self.data.loader in ("torch", "resident"):
            raise ValueError(f"data.cache=process is of the FFCV loader; data.loader={self.data.loader} has none")
        if self.data.resize and self.data.resize.to_epoch > self.train.epochs:
            raise ValueError(
                f"data.resize.to_epoch={self.data.resize.to_epoch} comes after the last of train.epochs="
                f"{self.train.epochs}"
            )
        if self.schedule.kind == "step" and not self.schedule.milestones:
            raise ValueError("schedule.kind=step needs schedule.milestones, e.g. schedule.milestones=[15,18]")
        if self.schedule.warmup_epochs >= self.train.epochs:
            raise ValueError(
                f"schedule.warmup_epochs={self.schedule.warmup_epochs} leaves none of train.epochs={self.train.epochs}"
                "; set it lower too, e.g. schedule.warmup_epochs=0"
            )
        return self

    def to_yaml(self) -> str:
        """Return the recipe as YAML that :func:`bdkd_dist.config.load` reads back to an equal recipe."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def to_dict(self) -> dict[str, Any]:
        """Return plain sections of numbers, words and lists."""
        plain = self.model_dump(mode="json", exclude={"objective"})
        plain["objective"] = dataclasses.asdict(self.objective)
        return {key: plain[key] for key in type(self).model_fields}


# Where and how fast a run runs, not what it computes: these may differ when a run goes on.
NOT_IDENTITY = (
    *("run.", "launch.", "data.root", "data.download", "data.loader", "data.threads"),
    *("data.prepared", "data.stage", "data.cache"),
)


def differences(one: Recipe, other: Recipe) -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, value in one, value in other) where two recipes would compute different things."""
    flat_one, flat_other = flatten(one.to_dict()), flatten(other.to_dict())
    # Names first: where the objective is another one, its parameters differ only as a consequence.
    for key in sorted(flat_one.keys() | flat_other.keys(), key=lambda k: (not k.endswith(".name"), k)):
        if not key.startswith(NOT_IDENTITY) and flat_one.get(key) != flat_other.get(key):
            yield key, flat_one.get(key), flat_other.get(key)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested sections as one level of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def last_name(key: str) -> str:
    """Return what a dotted key is called where it stands alone: its last part, of a schedule's also the parameter."""
    section, *names = key.removesuffix(".name").split(".")
    return ".".join(names[-2:] if section == "objective" else names[-1:]) or section
