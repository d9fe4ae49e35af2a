"""Settings of the main job: dataclasses with documented fields. ``config_io.py`` reads them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from spos_fast.calibration import MODES
from spos_fast.data import DataSource, load
from spos_fast.errors import InputError
from spos_fast.isomorphism import IsomorphismSampler
from spos_fast.pareto import check_objectives
from spos_fast.sampling import Constraint, UniformSampler
from spos_fast.spaces import Space
from spos_fast.spaces.settings import SPACE_CONFIGS, ShuffleNetV2Config, SpaceConfig
from spos_fast.training import TrainConfig
from spos_fast.widening import WideningSampler


@dataclass(frozen=True)
class DataConfig:
    """Where images come from.

    Attributes:
        name: digits, cifar10, cifar100 or imagenet.
        path: folder or archive of the data set; digits need none.
        validation: images that are split off the training part for the search: a fraction below 1, or a number a class;
            0 means the data set's own default (50 a class on imagenet).
        normalize: imagenet only: "imagenet" (mean and deviation) or "published" (BGR, 0 to 255), which the published
            supernet checkpoint needs.
        input_size: imagenet only: height and width that images are cut to.
    """

    name: str = "digits"
    path: str = ""
    validation: float = 0.0
    normalize: str = "imagenet"
    input_size: int = 224

    def __post_init__(self) -> None:
        if self.validation < 0 or (self.validation > 1 and self.validation % 1):
            raise InputError(
                f"validation: got {self.validation}; expected a fraction below 1 or a whole number a class"
            )
        if self.normalize not in ("imagenet", "published"):
            raise InputError(f"normalize: got {self.normalize!r}; expected imagenet or published")

    def load(self, workers: int | None = None) -> DataSource:
        """The data set; ``workers`` processes decode images, None is the data set's own choice.

        Raises:
            InputError: unknown name, or data that is missing, incomplete or damaged.
        """
        options: dict[str, Any] = {}
        if self.name == "imagenet":
            options = {"input_size": self.input_size, "normalize": self.normalize, "workers": workers}
        per_class = int(self.validation) if self.validation >= 1 else self.validation
        return load(self.name, self.path or None, validation=per_class or None, **options)


@dataclass(frozen=True)
class CostRange:
    """Ranges of cost; 0 leaves an end open.

    Attributes:
        macs_min: least multiply-accumulates of an architecture.
        macs_max: most multiply-accumulates of an architecture.
        params_min: least number of weights.
        params_max: most weights.
        bitops_min: least bit operations of an architecture of a quantized space.
        bitops_max: most bit operations; 14.21 G of the paper are 14.21 * 2**30, which is 15.26e9.
    """

    macs_min: float = 0.0
    macs_max: float = 0.0
    params_min: float = 0.0
    params_max: float = 0.0
    bitops_min: float = 0.0
    bitops_max: float = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name.endswith(("_min", "_max")) and not math.isfinite(getattr(self, field.name)):
                raise InputError(
                    f"{field.name}: got {getattr(self, field.name):g}; expected a number, or 0 for no limit"
                )

    @property
    def constraint(self) -> Constraint:
        """The ranges as a constraint."""
        return Constraint(
            macs=(self.macs_min or None, self.macs_max or None),
            params=(self.params_min or None, self.params_max or None),
            bitops=(self.bitops_min or None, self.bitops_max or None),
        )


@dataclass(frozen=True)
class SupernetConfig(CostRange, TrainConfig):
    """Training of the supernet; the ranges of cost are those of the sampled paths.

    Attributes:
        sampling: uniform over architectures, or isomorphism, uniform over classes of those whose networks are the same
            (in nasbench201 and nasbench_macro).
        widening_start: share of the steps in which blocks run at their widest ratio only.
        widening_end: share of the steps after which all ratios are drawn, within the ranges of cost; in between the
            smaller ones join one by one. 0: all from the first step on.
        keep_checkpoints: how many states of the supernet on the way are kept, evenly spaced, beside the last.
    """

    sampling: str = "uniform"
    widening_start: float = 0.0
    widening_end: float = 0.0
    keep_checkpoints: int = 0

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        CostRange.__post_init__(self)
        _ = self.constraint
        if self.keep_checkpoints < 0:
            raise InputError(f"keep_checkpoints: got {self.keep_checkpoints}; expected 0 or more")
        if self.sampling not in ("uniform", "isomorphism"):
            raise InputError(f"sampling: got {self.sampling!r}; expected uniform or isomorphism")
        if self.sampling != "uniform" and self.widening_end:
            raise InputError("sampling: a widening schedule draws uniformly; leave one of the two out")
        if not 0 <= self.widening_start <= self.widening_end <= 1:
            raise InputError(
                f"widening_start, widening_end: got {self.widening_start:g} and {self.widening_end:g}; "
                "expected shares of the steps, the first not above the second"
            )

    def sampler(self, space: Space) -> UniformSampler | WideningSampler | IsomorphismSampler:
        """What draws the paths of the training.

        Raises:
            InputError: an infeasible constraint, a widening schedule for a space without widths, or isomorphism in a
                space that is too large for it.
        """
        if self.sampling == "isomorphism":
            return IsomorphismSampler(space, self.constraint)
        sampler = UniformSampler(space, self.constraint)
        if self.widening_end == 0:
            return sampler
        return WideningSampler(sampler, self.steps, self.widening_start, self.widening_end)


@dataclass(frozen=True)
class SearchConfig(CostRange):
    """Evolutionary search, and random search under the same budget; the defaults are the paper's.

    Attributes:
        population: architectures a generation.
        generations: generations after the first population.
        top_k: number of parents.
        mutation_probability: chance of a gene to be drawn anew.
        crossover: children of two parents a generation.
        mutation: children of one parent a generation.
        random_search: whether random search runs too, as the baseline.
        bn_mode: statistics of batch normalisation: cumulative, pooled or ema.
        calibration_images: images of the training part that the statistics come from.
        calibration_batch: images in a batch of calibration.
        batch_size: images in a batch of validation.
        early_stopping: confidence, such as 0.99, with which candidates that do not reach the top_k are dropped before
            they have seen all validation images; 0: never.
        supernet: published SPOS checkpoint to search with, instead of training one.
        latency_table: file of `spos-fast latency`; costs then have a latency. The run keeps a copy.
        latency_ms_min: least predicted latency of an architecture, in milliseconds.
        latency_ms_max: most predicted latency of an architecture, in milliseconds.
        objectives: accuracy and one or more of macs, params, bitops, latency_ms, such as accuracy,macs, for a Pareto
            search (NSGA-II of Optuna) with the same population and generations; empty: none.
    """

    population: int = 50
    generations: int = 20
    top_k: int = 10
    mutation_probability: float = 0.1
    crossover: int = 25
    mutation: int = 25
    random_search: bool = True
    bn_mode: str = "cumulative"
    calibration_images: int = 20000
    calibration_batch: int = 128
    batch_size: int = 256
    early_stopping: float = 0.0
    supernet: str = ""
    latency_table: str = ""
    latency_ms_min: float = 0.0
    latency_ms_max: float = 0.0
    objectives: tuple[str, ...] = ()

    @property
    def constraint(self) -> Constraint:
        """The ranges as a constraint."""
        latency = (self.latency_ms_min or None, self.latency_ms_max or None)
        return dataclasses.replace(super().constraint, latency_ms=latency)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("population", "top_k", "calibration_images", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: got {getattr(self, name)}; expected a positive number")
        for name in ("generations", "crossover", "mutation"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}: got {getattr(self, name)}; expected 0 or more")
        if self.crossover + self.mutation > self.population:
            raise InputError(
                f"crossover, mutation: {self.crossover} + {self.mutation} children do not fit into a population "
                f"of {self.population}"
            )
        if not 0 <= self.mutation_probability <= 1:
            raise InputError(f"mutation_probability: got {self.mutation_probability}; expected 0 to 1")
        if self.calibration_batch < 2:
            raise InputError(f"calibration_batch: got {self.calibration_batch}; expected at least 2")
        if self.early_stopping and not 0.5 <= self.early_stopping < 1:
            raise InputError(f"early_stopping: got {self.early_stopping:g}; expected 0, or 0.5 or more and below 1")
        if self.bn_mode not in MODES:
            raise InputError(f"bn_mode: got {self.bn_mode!r}; expected one of {', '.join(MODES)}")
        for name in ("latency_ms_min", "latency_ms_max"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}: got {getattr(self, name):g}; expected milliseconds, or 0 for no limit")
        if self.objectives:
            check_objectives(self.objectives)
            if self.population < 2:
                raise InputError(f"population: got {self.population}; a Pareto search needs at least 2")
        _ = self.constraint


@dataclass(frozen=True)
class RetrainConfig(TrainConfig):
    """Training of single architectures on the whole training part.

    Attributes:
        init: "scratch", or "inherited" for the supernet's weights.
        bn_steps: batches of the training stream that set the final statistics of batch normalisation (the published
            code takes 1,250); 0 keeps the running ones.
        random_architectures: how many random architectures are retrained as a baseline.
    """

    init: str = "scratch"
    bn_steps: int = 20
    random_architectures: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init not in ("scratch", "inherited"):
            raise InputError(f"init: got {self.init!r}; expected scratch or inherited")
        for name in ("bn_steps", "random_architectures"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}: got {getattr(self, name)}; expected 0 or more")


@dataclass(frozen=True)
class ConsistencyConfig:
    """How well the supernet ranks architectures, against a table of networks that were trained one by one.

    Nothing binds: scores are kept by how they were made, and what is asked for anew is scored beside them.

    Attributes:
        table: file of the table: of nasbench201 the compact .npz, of nasbench_macro the official .json, or .csv.
        dataset: which of the table's data sets; empty: the one of the images' name.
        n: how many architectures are scored, drawn with the seed, or all.
        ablation: ways to set the statistics of batch normalisation: cumulative, pooled, ema, none.
        calibration_images: images of the training part that the statistics come from; with several numbers, the first
            way of ablation that takes images is scored with each of them, the others with the first number.
        calibration_batch: images in a batch of calibration.
        batch_size: images in a batch of validation.
        checkpoints: whether states that training kept (train.keep_checkpoints) are scored too.
    """

    table: str = ""
    dataset: str = ""
    n: str = "500"
    ablation: tuple[str, ...] = ("cumulative", "none")
    calibration_images: tuple[int, ...] = (4096,)
    calibration_batch: int = 128
    batch_size: int = 256
    checkpoints: bool = True

    def __post_init__(self) -> None:
        if self.n != "all" and not (self.n.isdecimal() and int(self.n) > 1):
            raise InputError(f"n: got {self.n!r}; expected a number of architectures, 2 or more, or all")
        for mode in self.ablation:
            if mode not in (*MODES, "none"):
                raise InputError(f"ablation: got {mode!r}; expected some of {', '.join(MODES)}, none")
        for name in ("ablation", "calibration_images"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise InputError(f"{name}: got {','.join(map(str, values))!r}; expected one or more, each once")
        if min(self.calibration_images) < 2 or self.calibration_batch < 2:
            raise InputError("calibration_images, calibration_batch: expected at least 2")
        if self.batch_size < 1:
            raise InputError(f"batch_size: got {self.batch_size}; expected a positive number")


@dataclass(frozen=True)
class Config:
    """Everything that the numbers of a run depend on.

    Attributes:
        seed: of every random choice.
        data: see :class:`DataConfig`.
        space: the fields of the space that it names, see :mod:`spos_fast.spaces.settings`.
        train: see :class:`SupernetConfig`.
        search: see :class:`SearchConfig`.
        retrain: see :class:`RetrainConfig`.
        consistency: see :class:`ConsistencyConfig`.
    """

    seed: int = 0
    data: DataConfig = DataConfig()
    space: SpaceConfig = dataclasses.field(default_factory=ShuffleNetV2Config)
    train: SupernetConfig = SupernetConfig()
    search: SearchConfig = SearchConfig()
    retrain: RetrainConfig = RetrainConfig()
    consistency: ConsistencyConfig = ConsistencyConfig()


# The dataclasses that a section may be of: what it names decides, or there is but one.
SECTIONS: dict[str, tuple[Any, ...]] = {
    "data": (DataConfig,),
    "space": tuple(dict.fromkeys(SPACE_CONFIGS.values())),
    "train": (SupernetConfig,),
    "search": (SearchConfig,),
    "retrain": (RetrainConfig,),
    "consistency": (ConsistencyConfig,),
}
