"""The networks of LPIPS, FID and KID, loaded from files that the user provides. Nothing is downloaded.

The files are pickles. They are loaded with `weights_only`, so no code in them is run, and must contain exactly the
tensors of their network.
"""

import importlib.resources
import io
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from layerdecomp.errors import InputError
from layerdecomp.metrics.layers import METRICS, Measures
from layerdecomp.metrics.perceptual import LPIPS, TRUNKS
from layerdecomp.metrics.region import REGIONS
from layerdecomp.tensor_files import file_sha256
from layerdecomp.weights import check_keys, shapes_of

logger = logging.getLogger(__name__)
FOLDER = "checkpoints/metrics"
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
FILES = {
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}


@dataclass
class MeasureConfig:
    """Settings of the measurement, and the location of its networks."""

    region: str = "full"  # of the background metrics: full, mask (the inpainted part) or outside (the part to keep)
    resolution: int | None = None  # longer side, in pixels, to which everything is resized first; null: no resizing
    lpips: str = "alex"  # network of LPIPS: alex, vgg or squeeze
    weights: str = FOLDER  # folder of the metric networks; checkpoints/README.md lists the files

    def __post_init__(self) -> None:
        for key, known in (("region", REGIONS), ("lpips", tuple(FILES))):
            if (value := getattr(self, key)) not in known:
                raise InputError(f"evaluate.measure.{key} is {value!r}; expected one of {', '.join(known)}")
        if self.resolution is not None and self.resolution < 16:
            raise InputError(f"evaluate.measure.resolution is {self.resolution}; expected at least 16, or null")


@dataclass(frozen=True)
class Networks:
    """The measures of a config, and which of their networks were found."""

    measures: Measures = field(default_factory=Measures)
    files: dict[str, str] = field(default_factory=dict)  # file -> sha256
    missing: dict[str, str] = field(default_factory=dict)  # metric -> why it cannot be measured


def open_networks(config: MeasureConfig) -> Networks:
    """Loads the networks whose files exist.

    Raises:
        InputError: a file is damaged or belongs to another network.
    """
    folder = Path(config.weights)
    trunk, inception = folder / FILES[config.lpips], folder / INCEPTION
    measures = Measures(
        config.region,
        config.resolution,
        load_lpips(config.lpips, trunk) if trunk.is_file() else None,
        load_inception(inception) if inception.is_file() else None,
    )
    needed = {
        name: path
        for name, info in METRICS.items()
        for need, path in (("lpips", trunk), ("inception", inception))
        if need in info.needs
    }
    return Networks(
        measures,
        {path.name: file_sha256(path) for path in (trunk, inception) if path.is_file()},
        {
            name: f"{path} does not exist; checkpoints/README.md says where to get it"
            for name, path in needed.items()
            if not path.is_file()
        },
    )


def load_lpips(net: str, path: Path) -> LPIPS:
    """LPIPS version 0.1 with a torchvision trunk from `path`; its small heads are bundled with torchmetrics."""
    with torch.device("meta"):
        trunk, network = TRUNKS[net].build(), LPIPS(net)
    state = _read(path)
    check_keys(path, shapes_of(state), shapes_of(trunk.state_dict()), f"torchvision's {type(trunk).__name__}")
    used = {name: state[name] for name in network.state_dict() if name.startswith("features.")}
    network.load_state_dict(used | _heads(network), assign=True)
    return network.requires_grad_(False)


def _heads(network: LPIPS) -> dict[str, Tensor]:
    """The channel weights of LPIPS, by their names in the network."""
    file = importlib.resources.files("torchmetrics.functional.image") / "lpips_models" / f"{network.net}.pth"
    found = torch.load(io.BytesIO(file.read_bytes()), map_location="cpu", weights_only=True)
    names = [f"lin{place}.model.1.weight" for place in range(len(network.heads))]
    expected = {name: tuple(head.shape) for name, head in zip(names, network.heads, strict=True)}
    check_keys(str(file), shapes_of(found), expected, "the heads of LPIPS")
    return {f"heads.{place}": found[name] for place, name in enumerate(names)}


def load_inception(path: Path) -> nn.Module:
    """torch-fidelity's port of the original FID network: images (B, 3, H, W) uint8 -> ((B, 2048),)."""
    state = _read(path)
    buffer = io.BytesIO()
    torch.save(state, buffer)  # the constructor takes a pickle and loads it without weights_only: pass checked tensors
    buffer.seek(0)
    try:
        return FeatureExtractorInceptionV3("inception-v3", ["2048"], feature_extractor_weights_path=buffer)
    except RuntimeError as error:
        raise InputError(f"{path} does not fit Inception: {error}; download it again") from error


def _read(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a pickled weight file; `InputError` for other content, a warning for an unpublished file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise InputError(f"{path} cannot be opened as weights ({reason}); download it again") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path} holds something other than a network's tensors; download it again")
    published = path.stem.rpartition("-")[2]  # file names end in the first digits of the sha256
    if not file_sha256(path).startswith(published):
        logger.warning("%s is not the published file: its sha256 does not start with %s", path, published)
    return state
