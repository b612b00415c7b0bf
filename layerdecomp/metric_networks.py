"""The networks of LPIPS, FID and KID, from files that the user puts into a folder. Nothing is downloaded.

The files are pickles. They are opened with `weights_only`, which runs nothing in them, and must hold exactly the
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
from layerdecomp.metrics.layers import Measures
from layerdecomp.metrics.perceptual import LPIPS, TRUNKS
from layerdecomp.metrics.region import REGIONS
from layerdecomp.tensor_files import file_sha256
from layerdecomp.weights import check_keys, shapes

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
    """What is measured, and where its networks lie."""

    region: str = "full"  # of the background metrics: full, mask (what was painted) or outside (what had to stay)
    resolution: int | None = None  # pixels of the longer side that everything is brought to before; null: as it is
    lpips: str = "alex"  # or vgg, squeeze: the network of LPIPS
    weights: str = FOLDER  # the folder of the metrics' networks; checkpoints/README.md lists the files

    def __post_init__(self) -> None:
        for key, known in (("region", REGIONS), ("lpips", tuple(FILES))):
            if (value := getattr(self, key)) not in known:
                raise InputError(f"evaluate.measure.{key} is {value!r}; expected one of {', '.join(known)}")
        if self.resolution is not None and self.resolution < 16:
            raise InputError(f"evaluate.measure.resolution is {self.resolution}; expected at least 16, or null")


@dataclass(frozen=True)
class Networks:
    """The measures that a config asks for, and what became of their networks."""

    measures: Measures = field(default_factory=Measures)
    files: dict[str, str] = field(default_factory=dict)  # file -> sha256
    missing: dict[str, str] = field(default_factory=dict)  # metric -> why it has no figures


def open_networks(config: MeasureConfig) -> Networks:
    """Loads the networks whose files are there.

    Raises:
        InputError: a file is there but damaged, or is another network's.
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
        "background/lpips": trunk,
        "background/fid": inception,
        "background/kid": inception,
        "recomposition/lpips": trunk,
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
    """LPIPS version 0.1 on a trunk of torchvision's file; its small heads come inside torchmetrics' wheel."""
    with torch.device("meta"):
        trunk, network = TRUNKS[net].build(), LPIPS(net)
    state = _read(path)
    check_keys(path, shapes(state), shapes(trunk.state_dict()), f"torchvision's {type(trunk).__name__}")
    used = {name: state[name] for name in network.state_dict() if name.startswith("features.")}
    network.load_state_dict(used | _heads(network), assign=True)
    return network.requires_grad_(False)


def _heads(network: LPIPS) -> dict[str, Tensor]:
    """The weights of the features' channels, by their names in the network."""
    file = importlib.resources.files("torchmetrics.functional.image") / "lpips_models" / f"{network.net}.pth"
    found = torch.load(io.BytesIO(file.read_bytes()), map_location="cpu", weights_only=True)
    names = [f"lin{place}.model.1.weight" for place in range(len(network.heads))]
    expected = {name: tuple(head.shape) for name, head in zip(names, network.heads, strict=True)}
    check_keys(str(file), shapes(found), expected, "the heads of LPIPS")
    return {f"heads.{place}": found[name] for place, name in enumerate(names)}


def load_inception(path: Path) -> nn.Module:
    """torch-fidelity's port of the network of the first FID figures: images (B, 3, H, W) uint8 -> ((B, 2048),)."""
    state = _read(path)
    buffer = io.BytesIO()
    torch.save(state, buffer)  # its constructor wants a pickle, and opens it without weights_only
    buffer.seek(0)
    try:
        return FeatureExtractorInceptionV3("inception-v3", ["2048"], feature_extractor_weights_path=buffer)
    except RuntimeError as error:
        raise InputError(f"{path} does not fit Inception: {error}; download it again") from error


def _read(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a pickled weight file; `InputError` if it holds anything else. Warns if it is not as published."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise InputError(f"{path} cannot be opened as weights ({reason}); download it again") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path} holds something else than a network's tensors; download it again")
    published = path.stem.rpartition("-")[2]  # the name ends in the first digits
    if not file_sha256(path).startswith(published):
        logger.warning("%s is not the published file: its sha256 does not start with %s", path, published)
    return state
