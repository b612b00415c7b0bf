"""The root configs, one per job, and how they are read.

Defaults and types are dataclasses beside the code that uses them; a YAML file holds what differs; `key=value` on the
command line comes last. A key that nobody knows, or a value of the wrong type, is an error that names it.
"""

import difflib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from layerdecomp.comparison import EvaluateConfig
from layerdecomp.conditioning import ConditioningConfig
from layerdecomp.data.datamodule import DataConfig
from layerdecomp.errors import InputError, check_at_least, check_probabilities
from layerdecomp.files import write_whole
from layerdecomp.flow import FlowConfig
from layerdecomp.manifest import DecomposerConfig, WeightFiles
from layerdecomp.models.autoencoder import AutoencoderConfig
from layerdecomp.models.mmdit import MMDiTConfig
from layerdecomp.quantization import check_bits, check_format
from layerdecomp.sampling import SampleConfig

ConfigT = TypeVar("ConfigT")


@dataclass
class TrainConfig:
    """How long, on what and how often."""

    steps: int = 7200
    batch_size: int = 8  # per process
    accumulate: int = 1  # batches of every process whose gradients make one step
    devices: int = 1
    nodes: int = 1
    strategy: str = "auto"  # ddp, which auto is as well where there are several processes
    precision: str = "auto"  # auto: bf16-mixed where the device computes in it, else 32-true
    checkpoint_every: int = 500  # steps
    validate_every: int = 500  # steps
    max_skipped: int = 5  # steps in a row whose gradient is not finite: after them, training stops
    ema: float = 0.0  # decay of a running average of what is trained, which is validated and written; 0: none
    deterministic: bool = False  # the same bits on the same machine, on a GPU as well, for some speed
    dry_run: bool = False  # only print what training would take, and which files are missing

    @property
    def global_batch(self) -> int:
        """Samples of a step, over all processes."""
        return self.batch_size * self.accumulate * self.devices * self.nodes

    def __post_init__(self) -> None:
        spread = ("batch_size", "accumulate", "devices", "nodes")
        check_at_least(1, self, "train.", *spread, "steps", "checkpoint_every", "validate_every")
        check_at_least(1, self, "train.", "max_skipped")
        check_probabilities(self, "train.", "ema")
        if self.ema == 1:
            raise InputError("train.ema is 1, which keeps the first weights for ever; expected less, such as 0.999")
        if self.precision not in ("auto", "32-true", "bf16-mixed"):  # trained tensors are float32, always
            raise InputError(f"train.precision is {self.precision!r}; expected auto, 32-true or bf16-mixed")
        if self.strategy not in ("auto", "ddp"):
            raise InputError(f"train.strategy is {self.strategy!r}; expected auto or ddp (and see shard_base)")


@dataclass
class OptimConfig:
    """AdamW, or Muon for the matrices inside the blocks (and convolutions) and Adam for the rest."""

    lr: float = 5e-5
    muon: bool = False
    warmup: int = 0  # steps over which the rate rises from 0
    decay: bool = False  # cosine, to 2 % at the last step
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 0.0
    clip: float = 1.0  # norm of the whole gradient
    bits: int = 32  # of AdamW's averages: 32, or 8 with a scale per 256 of them (torchao's)

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"optim.betas is {self.betas}; expected two numbers from 0 to less than 1")
        check_at_least(0, self, "optim.", "lr", "warmup", "weight_decay")
        if self.muon and self.weight_decay:
            raise InputError(f"optim.weight_decay is {self.weight_decay}, which optim.muon does not use; set it to 0")
        check_bits("optim.bits", self.bits)
        if self.muon and self.bits != 32:
            raise InputError(f"optim.bits is {self.bits}, which optim.muon does not have; set it to 32")


@dataclass
class RunConfig:
    """What every job has."""

    job: str = ""
    name: str = "run"
    run_dir: str = "runs/${name}"
    seed: int = 0
    resume: str = "auto"  # auto: go on with an unfinished run of the same config; never: start anew; or a checkpoint
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        check_at_least(0, self, "", "seed")


@dataclass
class FlowJobConfig(RunConfig):
    """What the jobs that train by flow matching share."""

    conditioning: ConditioningConfig = field(default_factory=ConditioningConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    weights: WeightFiles = field(default_factory=WeightFiles)
    recompute: int = 0  # every how many transformer blocks activations are computed again, to save memory; 0: none
    recompute_attention: bool = True  # in those blocks; false: its output is kept instead, for a little memory
    compile: bool = False  # the transformer's blocks and encoders, in minutes at first; faster steps on a GPU
    latent_cache: str | None = None  # a folder: each of `data.samples` is encoded once; null: each time that it comes

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(0, self, "", "recompute")


@dataclass
class DecomposerJobConfig(FlowJobConfig, DecomposerConfig):
    """Adapt a frozen inpainting transformer to layer decomposition."""

    adapter: str | None = None  # a trained one of the same frozen parts to go on from; null: from the base alone
    training_guidance: float = 1.0  # the scale fed to guidance-distilled models while they are adapted
    quantize: str | None = None  # the frozen transformer's matrices: int8, fp8 or nf4; null: as they compute
    shard_base: bool = False  # shared out among the processes, where a card cannot hold the frozen transformer
    pictures_at_once: int = 0  # that an autoencoder encodes, to save memory; 0: all of a batch

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(0, self, "", "pictures_at_once")
        check_format(self.quantize)
        if self.shard_base:
            self._check_sharding()

    def _check_sharding(self) -> None:
        train, rule = self.train, "shard_base=true shares the frozen transformer out among the processes of a run: "
        if train.devices * train.nodes == 1:
            raise InputError(f"{rule}found train.devices=1 and train.nodes=1, expected several; set shard_base=false")
        if self.quantize is not None:
            raise InputError(f"{rule}found quantize={self.quantize}, whose tensors cannot be cut; expected null")
        if self.compile and self.recompute and not self.recompute_attention:
            raise InputError(
                f"{rule}found compile=true, recompute and recompute_attention=false; expected not all three"
            )
        if "maskless" in self.evaluate.rows:
            raise InputError(f"{rule}found maskless in evaluate.rows, a second one on every card; leave it out")


@dataclass
class AutoencoderJobConfig(RunConfig):
    """Train an autoencoder: RGB from nothing, RGBA from a trained RGB one, or the decoder of either further."""

    model: AutoencoderConfig = field(default_factory=AutoencoderConfig)  # of an RGB one; RGBA takes `extend`'s
    extend: str | None = None  # weights of the RGB autoencoder that an RGBA one starts from
    refine: str | None = None  # a trained autoencoder, RGB or RGBA, of which only the decoder learns: latents stay
    kl: float = 1e-4  # weight of the latents' divergence from a standard normal, per latent
    projection: float = 0.0  # weight of keeping latents near the best linear ones; 0: no such thing
    anchor: float = 1.0  # RGBA, unless projected: weight of keeping the RGB autoencoder's latents of opaque pictures,
    foreground_anchor: float = 0.02  # and of the same with foregrounds, where alpha needs some room
    noise: float = 0.0  # typical deviation of noise on the scaled latents, since a transformer's are never exact

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.extend is not None and self.refine is not None:
            raise InputError(f"extend={self.extend} and refine={self.refine}: expected one of them; set the other null")
        if self.extend is None and self.refine is None:
            check_holes(self)


@dataclass
class InpainterJobConfig(FlowJobConfig):
    """Train a small inpainting base from nothing."""

    model: MMDiTConfig = field(default_factory=MMDiTConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_holes(self)


def check_holes(config: RunConfig) -> None:
    """Raises `InputError` unless samples are scenes, which alone come with holes for some jobs to cut into pictures."""
    if config.data.source != "scenes":
        raise InputError(f"data.source is {config.data.source}; expected scenes, for this job")


JOBS: dict[str, type[Any]] = {
    "decomposer": DecomposerJobConfig,
    "autoencoder": AutoencoderJobConfig,
    "inpainter": InpainterJobConfig,
}
# What may change when a run is continued: none of it changes what is trained (`compile` no more than rounding).
RESUMABLE: frozenset[str] = frozenset(
    {
        *("resume", "run_dir", "recompute", "recompute_attention", "compile", "shard_base"),
        *("pictures_at_once", "train.dry_run"),
        *("data.workers", "data.validation", "data.max_faulty"),
        *("train.checkpoint_every", "train.validate_every", "train.max_skipped", "train.strategy"),
    }
)
# Of these, the product alone matters: how many samples a step has.
SPREAD: frozenset[str] = frozenset({"train.batch_size", "train.accumulate", "train.devices", "train.nodes"})


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Any:
    """The config dataclass of a job from a YAML file, the file that its `base` names, and `key=value` overrides.

    Raises:
        InputError: the file is missing or no YAML, a key is unknown (with the nearest known one), a value of another
            type, or a combination that its class refuses.
    """
    files = _with_base(Path(path))
    given = OmegaConf.merge(*(content for _, content in files))
    job = cast(dict[str, Any], OmegaConf.to_container(given)).get("job")
    if job not in list(JOBS):
        raise InputError(f"{path}: job is {job!r}; expected one of {', '.join(JOBS)}")
    config = merge_config(JOBS[job], files, overrides)
    if config.job != job:
        raise InputError(f"argument 'job={config.job}': {path} describes a {job} job; name another config= instead")
    return config


def _with_base(path: Path) -> list[tuple[str, DictConfig]]:
    """A file's content, after that of the one file which its key `base` may name, beside it."""
    content = read_yaml(path)
    base = content.pop("base", None)
    if base is None:
        return [(str(path), content)]
    below = read_yaml(path.parent / str(base))
    if "base" in below:
        raise InputError(f"{path}: base is {base}, which has a base itself; expected a file without one")
    return [(str(path.parent / str(base)), below), (str(path), content)]


def merge_config(
    defaults: ConfigT | type[ConfigT], files: Sequence[tuple[str, DictConfig]], overrides: Sequence[str]
) -> ConfigT:
    """A config dataclass: its defaults, then each named file's content, then each `key=value` over them."""
    merged = OmegaConf.structured(defaults)
    OmegaConf.set_readonly(merged, False)  # as that of a frozen dataclass is
    sources = [*files, *((f"argument {text!r}", _parse_override(text)) for text in overrides)]
    flat = _dotted(OmegaConf.to_container(merged))
    known = sorted(flat)
    free = tuple(f"{key}." for key, value in flat.items() if value == {})  # dictionaries, which take any key
    for name, source in sources:
        for key, value in _dotted(OmegaConf.to_container(source)).items():
            if not key.startswith(free):
                _check_known(key, known, name)
            if isinstance(flat.get(key), list) and isinstance(value, str | int | float):
                raise InputError(f"{name}: found {value!r}, expected a list: {key}=[{value}]")
        try:
            merged = OmegaConf.merge(merged, source)
        except (OmegaConfBaseException, ValueError) as error:
            default = flat.get(getattr(error, "full_key", None) or "")
            raise InputError(f"{name}: {_first_line(error)}; expected {_kind(default)}") from error
    for key, value in _dotted(OmegaConf.to_container(merged)).items():
        if isinstance(value, float) and math.isnan(value):
            raise InputError(f"{key} is {value}; expected a number")
    try:
        return cast(ConfigT, OmegaConf.to_object(merged))
    except MissingMandatoryValue as error:
        raise InputError(f"{error.full_key or error.key}= is missing; expected a value for it") from error
    except OmegaConfBaseException as error:
        raise InputError(f"{', '.join(name for name, _ in sources)}: {_first_line(error)}") from error


def save_config(path: Path, config: RunConfig) -> None:
    """Writes a config with every default spelled out."""
    write_whole(path, OmegaConf.to_yaml(OmegaConf.create(asdict(config))))


def changed_keys(config: RunConfig, path: Path) -> dict[str, str]:
    """The keys that matter to results in which a config differs from one that `save_config` wrote: "1 then, 2 now".

    A key that the other does not have, since it is older, counts as having its default there.
    """
    now = _dotted(asdict(config))
    before = _dotted(asdict(type(config)())) | _dotted(OmegaConf.to_container(read_yaml(path)))
    free = set(RESUMABLE)
    if _product(before) == _product(now):
        free |= SPREAD
    known = {key for tree in (before, now) for key, value in tree.items() if value != {}}  # {}: no keys of its own
    changed = sorted(key for key in known if before.get(key) != now.get(key) and key not in free)
    return {key: f"{before.get(key, 'absent')} then, {now.get(key, 'absent')} now" for key in changed}


def _product(flat: dict[str, Any]) -> int:
    return math.prod(flat[key] for key in SPREAD)


def read_yaml(path: Path) -> DictConfig:
    """The keys and values of a YAML file; `InputError` if it is missing or holds something else."""
    if not path.is_file():
        raise InputError(f"config {path} does not exist; configs/ has {_yaml_names()}")
    try:
        content = OmegaConf.load(path)
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise InputError(f"config {path} is not readable YAML: {error}") from error
    if not isinstance(content, DictConfig):
        raise InputError(f"config {path}: found a list or a single value, expected keys and values")
    return content


def _yaml_names() -> str:
    return ", ".join(sorted(path.name for path in Path("configs").glob("*.yaml"))) or "no files here"


def _parse_override(text: str) -> DictConfig:
    key, separator, _ = text.partition("=")
    if not separator or not key:
        raise InputError(f"argument {text!r}: expected key=value")
    try:
        return OmegaConf.from_dotlist([text])
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise InputError(f"argument {text!r}: {_first_line(error)}") from error


def _dotted(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _check_known(key: str, known: list[str], source: str) -> None:
    if key in known:
        return
    sections = [name for name in known if name.startswith(f"{key}.")]
    if sections:
        raise InputError(f"{source}: {key} is a section; expected one of its keys: {', '.join(sections)}")
    namesakes = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    if nearest := difflib.get_close_matches(key, namesakes, 1, cutoff=0.0) or difflib.get_close_matches(key, known, 1):
        raise InputError(f"{source}: unknown key {key}; the nearest known one is {nearest[0]}")
    begins = ", ".join(dict.fromkeys(name.partition(".")[0] for name in known))
    raise InputError(f"{source}: unknown key {key}; the known ones begin with {begins}")


def _kind(default: Any) -> str:
    """What is expected where there is a default, in words."""
    kinds = {bool: "true or false", int: f"a whole number, such as {default}", float: f"a number, such as {default}"}
    return kinds.get(type(default), "the type of its default")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
