"""The root configs, one per job, and how they are read.

Defaults and types are dataclasses next to the code that uses them; `overrides.py` merges YAML files and arguments into
them.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from layerdecomp.comparison import EvaluateConfig
from layerdecomp.conditioning import ConditioningConfig
from layerdecomp.data.datamodule import DataConfig
from layerdecomp.errors import InputError, check_at_least, check_probabilities
from layerdecomp.files import atomic_write
from layerdecomp.flow import FlowConfig
from layerdecomp.manifest import DecomposerConfig, WeightFiles, adapter_file
from layerdecomp.models.autoencoder import AutoencoderConfig
from layerdecomp.models.mmdit import MMDiTConfig
from layerdecomp.overrides import dotted, merge_config, read_yaml
from layerdecomp.quantization import check_format, check_optimizer_bits
from layerdecomp.sampling import SampleConfig


@dataclass
class TrainConfig:
    """Length, devices, precision and schedule of a run."""

    steps: int = 7200
    batch_size: int = 8  # per process
    accumulate: int = 1  # gradient accumulation: batches per process and step
    devices: int = 1
    nodes: int = 1
    strategy: str = "auto"  # auto or ddp; auto is ddp if there are several processes
    precision: str = "auto"  # auto: bf16-mixed on devices with native bf16, else 32-true
    checkpoint_every: int = 500  # steps
    validate_every: int = 500  # steps
    max_skipped: int = 5  # training stops after this many steps in a row with a non-finite gradient
    ema: float = 0.0  # decay of an average of the trained tensors, which is validated and written; 0: none
    deterministic: bool = False  # bit-identical on the same machine, on a GPU too; somewhat slower
    dry_run: bool = False  # only print what training would need, and which files are missing

    @property
    def processes(self) -> int:
        """Ranks of a run, over all nodes."""
        return self.devices * self.nodes

    @property
    def global_batch(self) -> int:
        """Samples per step, over all processes."""
        return self.batch_size * self.accumulate * self.processes

    def __post_init__(self) -> None:
        spread = ("batch_size", "accumulate", "devices", "nodes")
        check_at_least(1, self, "train.", *spread, "steps", "checkpoint_every", "validate_every", "max_skipped")
        check_probabilities(self, "train.", "ema")
        if self.ema == 1:
            raise InputError("train.ema is 1, which keeps the initial weights forever; expected less, such as 0.999")
        if self.precision not in ("auto", "32-true", "bf16-mixed"):  # trained tensors are always float32
            raise InputError(f"train.precision is {self.precision!r}; expected auto, 32-true or bf16-mixed")
        if self.strategy not in ("auto", "ddp"):
            raise InputError(f"train.strategy is {self.strategy!r}; expected auto or ddp (and see shard_base)")


@dataclass
class OptimConfig:
    """AdamW; or, with `muon`, Muon for the matrices inside the blocks (and convolutions) and Adam for the rest."""

    lr: float = 5e-5
    muon: bool = False
    warmup: int = 0  # steps of linear warm-up
    decay: bool = False  # cosine decay, to 2 % at the last step
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 0.0
    clip: float = 1.0  # maximum norm of the whole gradient; 0: no clipping
    bits: int = 32  # of AdamW's moments: 32, or 8 with a scale per 256 values (torchao)

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"optim.betas is {self.betas}; expected two numbers from 0 to less than 1")
        check_at_least(0, self, "optim.", "lr", "warmup", "weight_decay", "clip")
        if self.muon and self.weight_decay:
            raise InputError(f"optim.weight_decay is {self.weight_decay}, which optim.muon does not use; set it to 0")
        check_optimizer_bits("optim.bits", self.bits)
        if self.muon and self.bits != 32:
            raise InputError(f"optim.bits is {self.bits}, which optim.muon does not support; set it to 32")


@dataclass
class RunConfig:
    """Settings of every job."""

    job: str = ""
    name: str = "run"
    run_dir: str = "runs/${name}"
    seed: int = 0
    resume: str = "auto"  # auto: resume a run of the same config; never: start over; or a checkpoint file
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    @property
    def start(self) -> Path | None:
        """The weight file or folder whose tensors the run goes on training; None: it trains new ones."""
        return None

    def __post_init__(self) -> None:
        check_at_least(0, self, "", "seed")
        if self.data.validation < self.train.processes:  # a rank without samples would make the others hang
            raise InputError(
                f"data.validation is {self.data.validation}; expected at least one for each of "
                f"{self.train.processes} processes"
            )


@dataclass
class FlowJobConfig(RunConfig):
    """Settings of the flow-matching jobs."""

    conditioning: ConditioningConfig = field(default_factory=ConditioningConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    weights: WeightFiles = field(default_factory=WeightFiles)
    recompute: int = 0  # activation checkpointing of every n-th transformer block, to save memory; 0: none
    recompute_attention: bool = True  # in those blocks; false: keep its output, for a little memory
    compile: bool = False  # the transformer's blocks and the encoders: minutes of compilation, faster GPU steps
    latent_cache: str | None = None  # folder in which each of `data.samples` is encoded once; null: encode every time

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(0, self, "", "recompute")


@dataclass
class DecomposerJobConfig(FlowJobConfig, DecomposerConfig):
    """Adapt a frozen inpainting transformer to layer decomposition."""

    adapter: str | None = None  # an adapter of these frozen parts (or of adapter_base) to train further; null: none
    adapter_base: str | None = None  # the base that `adapter` was trained on, if it is not weights.transformer
    training_guidance: float = 1.0  # fed to guidance-distilled models in training, as other trainers of Fill do
    quantize: str | None = None  # the frozen transformer's matrices: int8, fp8 or nf4; null: compute precision
    shard_base: bool = False  # shard the frozen transformer across processes, if one device cannot hold it
    encode_batch_size: int = 0  # images that an autoencoder encodes at once, to save memory; 0: all of a batch

    @property
    def start(self) -> Path | None:
        return None if self.adapter is None else adapter_file(self.adapter)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(0, self, "", "encode_batch_size")
        check_format(self.quantize)
        if self.adapter_base is not None and self.adapter is None:
            raise InputError(
                f"adapter_base is {self.adapter_base}, but adapter is null; name the adapter to train further"
            )
        if self.shard_base:
            self._check_sharding()

    def _check_sharding(self) -> None:
        rule = "shard_base=true shards the frozen transformer across the processes of a run: "
        if self.train.processes == 1:
            raise InputError(f"{rule}found train.devices=1 and train.nodes=1, expected several; set shard_base=false")
        if self.quantize is not None:
            raise InputError(f"{rule}found quantize={self.quantize}, whose tensors cannot be sharded; expected null")
        if self.compile and self.recompute and not self.recompute_attention:
            raise InputError(
                f"{rule}found compile=true, recompute and recompute_attention=false; expected not all three"
            )
        if "maskless" in self.evaluate.rows:
            raise InputError(f"{rule}found maskless in evaluate.rows, which loads a second one; leave it out")


@dataclass
class AutoencoderJobConfig(RunConfig):
    """Train an autoencoder: RGB from scratch, RGBA from a trained RGB one, or only the decoder of either."""

    model: AutoencoderConfig = field(default_factory=AutoencoderConfig)  # of an RGB one; RGBA uses `extend`'s
    extend: str | None = None  # weights of the RGB autoencoder that initialises an RGBA one
    refine: str | None = None  # a trained RGB or RGBA autoencoder: only its decoder is trained, latents do not change
    kl: float = 1e-4  # weight of the KL divergence from a standard normal, per latent
    projection: float = 0.0  # weight of the distance from the best linear latents; 0: no such term
    anchor: float = 1.0  # RGBA without `projection`: weight of the distance from RGB latents for opaque images,
    foreground_anchor: float = 0.02  # and for foregrounds, where alpha needs some room
    noise: float = 0.0  # typical deviation of noise on the scaled latents, since a transformer's are never exact

    @property
    def start(self) -> Path | None:
        source = self.refine or self.extend
        return None if source is None else Path(source)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.extend is not None and self.refine is not None:
            raise InputError(f"extend={self.extend} and refine={self.refine}: expected one of them; set the other null")
        if self.extend is None and self.refine is None:
            check_holes(self)


@dataclass
class InpainterJobConfig(FlowJobConfig):
    """Train a small inpainting base, from scratch or from the weights of an earlier one."""

    model: MMDiTConfig = field(default_factory=MMDiTConfig)
    transformer: str | None = None  # a base of this architecture to train further; null: from scratch

    @property
    def start(self) -> Path | None:
        return None if self.transformer is None else Path(self.transformer)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_holes(self)


def check_holes(config: RunConfig) -> None:
    """Raises `InputError` unless samples are scenes: only those come with the holes that some jobs need."""
    if config.data.source != "scenes":
        raise InputError(f"data.source is {config.data.source}; expected scenes, for this job")


JOBS: dict[str, type[Any]] = {
    "decomposer": DecomposerJobConfig,
    "autoencoder": AutoencoderJobConfig,
    "inpainter": InpainterJobConfig,
}
# Keys that may change when a run is resumed, besides all of `evaluate`: they do not change the trained tensors
# (`compile` only by rounding).
RESUMABLE: frozenset[str] = frozenset(
    {
        "resume",
        "run_dir",
        "recompute",
        "recompute_attention",
        "compile",
        "shard_base",
        "encode_batch_size",
        "data.workers",
        "data.validation",
        "data.max_faulty",
        "train.checkpoint_every",
        "train.validate_every",
        "train.max_skipped",
        "train.strategy",
        "train.dry_run",
    }
)
# Beginnings of the keys of `evaluate` that do not change the figures of the run's own weights (except by rounding).
OTHER_ROWS = ("evaluate.batch_size", "evaluate.rows", "evaluate.maskless", "evaluate.published")
# Of these, only the product matters: the number of samples per step.
SPREAD: frozenset[str] = frozenset({"train.batch_size", "train.accumulate", "train.devices", "train.nodes"})


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Any:
    """The config dataclass of a job, from a YAML file, the file that its `base` names, and `key=value` overrides.

    Raises:
        InputError: the file is missing or not YAML, a key is unknown (the nearest known one is named), a value has the
            wrong type, or the config class rejects a combination.
    """
    files = _with_base(Path(path))
    given = OmegaConf.merge(*(content for _, content in files))
    job = cast(dict[str, Any], OmegaConf.to_container(given)).get("job")
    if job not in list(JOBS):  # a list, since job may be unhashable
        raise InputError(f"{path}: job is {job!r}; expected one of {', '.join(JOBS)}")
    config = merge_config(JOBS[job], files, overrides)
    if config.job != job:
        raise InputError(f"argument 'job={config.job}': {path} describes a {job} job; name another config= instead")
    return config


def _with_base(path: Path) -> list[tuple[str, DictConfig]]:
    """A file's content, preceded by that of the file that its key `base` names, if any, in the same folder."""
    content = read_yaml(path)
    base = content.pop("base", None)
    if base is None:
        return [(str(path), content)]
    below = read_yaml(path.parent / str(base))
    if "base" in below:
        raise InputError(f"{path}: base is {base}, which has a base itself; expected a file without one")
    return [(str(path.parent / str(base)), below), (str(path), content)]


def save_config(path: Path, config: RunConfig) -> None:
    """Writes a config with every default spelled out."""
    atomic_write(path, OmegaConf.to_yaml(OmegaConf.create(asdict(config))))


def changed_keys(config: RunConfig, path: Path, *, evaluated: bool = False) -> dict[str, str]:
    """The keys that affect results and differ from a config that `save_config` wrote: "1 then, 2 now".

    A key that is missing from an older config counts as having its default there. Keys of `evaluate` only count if the
    run has been `evaluated`.
    """
    now = dotted(asdict(config))
    saved = dotted(OmegaConf.to_container(read_yaml(path)))
    before = dotted(asdict(type(config)())) | saved
    free = RESUMABLE | SPREAD if _product(before) == _product(now) else RESUMABLE
    ignored = OTHER_ROWS if evaluated else ("evaluate.",)
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    return {
        key: f"{before.get(key, 'absent')} then, {now.get(key, 'absent')} now"
        for key in changed
        if key not in free and not key.startswith(ignored)
    }


def _product(flat: dict[str, Any]) -> int:
    return math.prod(flat[key] for key in SPREAD)
