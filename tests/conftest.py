"""Shared helpers and fixtures: tiny models with random weights, runs on two ranks, simulated power cuts."""

import io
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from layerdecomp.config import load_config
from layerdecomp.decomposer import Decomposer, build_decomposer
from layerdecomp.manifest import DecomposerConfig, WeightFiles
from layerdecomp.metric_networks import FILES, INCEPTION
from layerdecomp.metrics.perceptual import TRUNKS
from layerdecomp.models.autoencoder import Autoencoder, AutoencoderConfig
from layerdecomp.models.context_fusion import ContextFusionConfig
from layerdecomp.models.lora import LoRAConfig
from layerdecomp.models.mmdit import MMDiT, MMDiTConfig
from layerdecomp.training.decomposer import DecomposerJob
from layerdecomp.training.runs import train
from layerdecomp.weights import save_model

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def alone() -> dict[str, str]:
    """The environment without the port, rank and size that Lightning leaves behind after a test with ranks."""
    leftover = ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "RANK")
    return {name: value for name, value in os.environ.items() if name not in leftover}


@pytest.fixture(autouse=True, scope="module")
def no_leaked_threads_or_processes() -> Iterator[None]:
    """Fails if a test module leaks a thread or a process that would keep the interpreter from exiting.

    Pool threads are exempt, since the interpreter ends them: torch's compiler keeps a pool once it has compiled.
    """
    yield
    children = [child for child in multiprocessing.active_children() if not child.daemon]
    others = set(threading.enumerate()) - {threading.main_thread()}
    threads = [thread for thread in others if not thread.daemon and not thread.name.startswith("ThreadPoolExecutor")]
    for child in children:
        child.kill()
    assert not children and not threads


def become_rank(rank: int, port: int) -> None:
    """Makes this process one of two ranks, with the environment variables that torchrun sets, and one thread."""
    torch.set_num_threads(1)
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    os.environ.update(variables | {"WORLD_SIZE": "2"})


def as_ranks(target: Callable[..., None], *arguments: Any) -> list[int | None]:
    """Runs a function as the two ranks of a run, in processes with preloaded imports, and returns the exit codes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["layerdecomp.training.runs"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=target, args=(rank, port, *arguments)) for rank in range(2)]
    try:
        for process in processes:
            process.start()
        started = time.monotonic()
        for process in processes:
            process.join(60 - (time.monotonic() - started))
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()


def run(name: str, *overrides: str) -> Path:
    """Trains with configs/<name>.yaml and returns the run's directory."""
    config = load_config(CONFIGS / f"{name}.yaml", overrides)
    train(config)
    return Path(config.run_dir)


def curve(run_dir: Path, tag: str = "train/loss") -> dict[int, float]:
    """The values of a TensorBoard curve by step; the values of a step that was logged twice must agree."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    values: dict[int, float] = {}
    for event in events.Scalars(tag):
        assert event.step not in values or values[event.step] == event.value
        values[event.step] = event.value
    return values


class PowerCutError(Exception):
    """Ends a run at an arbitrary point, as a power cut would."""


@contextmanager
def power_cut_at(step: int) -> Iterator[None]:
    """Makes the loss raise `PowerCutError` after so many steps of an adapter training, and expects the error."""
    original = DecomposerJob.loss

    def failing(self: DecomposerJob, batch: dict[str, Any]) -> dict[str, Tensor]:
        if self.global_step == step:
            raise PowerCutError
        return original(self, batch)

    with mock.patch.object(DecomposerJob, "loss", failing), pytest.raises(PowerCutError):
        yield


TRANSFORMER = MMDiTConfig(
    hidden_size=32,
    num_heads=2,
    axes_dim=[4, 6, 6],
    depth=1,
    depth_single_blocks=1,
    context_in_dim=8,
    vec_in_dim=8,
    guidance_embed=False,
)
RGB = AutoencoderConfig(ch=8, ch_mult=[1, 1, 2, 2], num_res_blocks=1, norm_groups=4)
RGBA = AutoencoderConfig(**{**vars(RGB), "in_channels": 4})


def save_picture(array: np.ndarray, path: Path, **options: Any) -> Path:
    """Writes an array as an image file, with the folders above it, and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Whether two dicts have the same names and equal tensors."""
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


@torch.no_grad()
def fill(module: nn.Module, seed: int) -> None:
    """Draws every parameter at random, scaled to keep activations near one: no gain is 1, no bias is 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        matrix = parameter.dim() > 1 and parameter[0].numel() > 1
        gain = name.endswith(("norm1.weight", "norm2.weight", "norm.weight", "norm_out.weight", ".scale"))
        parameter.copy_(noise / parameter[0].numel() ** 0.5 if matrix else 0.2 * noise + gain)


def fill_adapter(decomposer: Decomposer, seed: int) -> None:
    """Draws every tensor of a decomposer's adapter at random, as `fill` does."""
    tensors = decomposer.adapter({}).tensors
    fill(nn.ParameterDict({name.replace(".", "/"): tensor for name, tensor in tensors.items()}), seed)


def write_tiny_models(folder: Path) -> WeightFiles:
    """Writes the three frozen models into a folder; the foregrounds that they decode are mostly transparent."""
    files = WeightFiles(*(str(folder / f"{name}.safetensors") for name in ("transformer", "autoencoder")))
    files.rgba_autoencoder = str(folder / "rgba_autoencoder.safetensors")
    models = {
        files.transformer: MMDiT(TRANSFORMER),
        files.autoencoder: Autoencoder(RGB),
        files.rgba_autoencoder: Autoencoder(RGBA),
    }
    for seed, (path, model) in enumerate(models.items()):
        fill(model, seed)
        if isinstance(model, Autoencoder) and model.config.in_channels == 4:
            model.decoder.conv_out.bias.data[3] = -1.0
        save_model(path, model, {"origin": "random"})
    return files


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> DecomposerConfig:
    """A decomposer config whose frozen models are files in a temporary folder."""
    return DecomposerConfig(
        weights=write_tiny_models(tmp_path_factory.mktemp("tiny")),
        lora=LoRAConfig(rank=2, alpha=3.0),
        fusion=ContextFusionConfig(num_queries=4, num_heads=2),
    )


@pytest.fixture(scope="session")
def tiny_weights(tiny_config: DecomposerConfig) -> Path:
    """A folder with transformer, autoencoder, rgba_autoencoder and adapter.safetensors; do not modify it."""
    folder = Path(tiny_config.weights.transformer).parent
    decomposer = build_decomposer(tiny_config)
    fill_adapter(decomposer, seed=3)
    decomposer.adapter(tiny_config.to_metadata()).save(folder / "adapter.safetensors")
    return folder


@pytest.fixture(scope="session")
def tiny_decomposer(tiny_weights: Path) -> Decomposer:
    """The decomposer of `tiny_weights`; do not modify it."""
    return Decomposer.from_pretrained(tiny_weights / "adapter.safetensors")


@pytest.fixture
def tiny_overrides(tiny_weights: Path) -> list[str]:
    """Overrides that reduce configs/tiny.yaml to the smallest adapter training."""
    names = ("transformer", "autoencoder", "rgba_autoencoder")
    return [f"weights.{name}={tiny_weights / name}.safetensors" for name in names] + [
        "lora.rank=2",
        "fusion.num_queries=4",
        "fusion.num_heads=2",
        "data.scenes.size=32",
        "data.validation=2",
        "data.workers=0",
        "evaluate.samples=3",
        "evaluate.batch_size=2",
        "sample.steps=2",
        "train.batch_size=2",
        "sample.ensemble=1",
        "latent_cache=null",
    ]


EVERYTHING = ["txt_in", "*_blocks.*", "final_layer.*", "time_in.*", "vector_in.*"]


@pytest.fixture(scope="session", params=["default", "everything"])
def adapter_file(
    request: pytest.FixtureRequest, tiny_config: DecomposerConfig, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An adapter with random parameters: of the default targets, and of all linear layers."""
    lora = tiny_config.lora if request.param == "default" else LoRAConfig(3, 1.5, EVERYTHING)
    config = replace(tiny_config, lora=lora)
    decomposer = build_decomposer(config)
    fill_adapter(decomposer, seed=5)
    path = tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
    facts = {
        "date": "2026-01-02T03:04:05+00:00",
        "figures": '{"background/psnr": 20.5, "background/psnr_stderr": 0.25}',
        "data": '{"source": "scenes"}',
    }
    decomposer.adapter({**config.to_metadata(), **facts}).save(path)
    return path


@pytest.fixture
def adapted(adapter_file: Path) -> MMDiT:
    """The transformer with the LoRA of `adapter_file`."""
    return Decomposer.from_pretrained(adapter_file).transformer


@pytest.fixture(scope="session")
def metric_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of the metric networks, with published names and layouts and random weights."""
    folder = tmp_path_factory.mktemp("metrics")
    generator = torch.Generator().manual_seed(0)

    def random_tensor(name: str, tensor: Tensor) -> Tensor:
        if name.startswith("classifier."):  # unused, and most of the file
            return torch.zeros(1).expand(tensor.shape)
        return torch.randn(tensor.shape, generator=generator) / max(1, tensor[0].numel()) ** 0.5

    for net, trunk in TRUNKS.items():
        with torch.device("meta"):
            tensors = trunk.build().state_dict()
        torch.save({name: random_tensor(name, tensor) for name, tensor in tensors.items()}, folder / FILES[net])
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    with mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"):
        inception = FeatureExtractorInceptionV3("random", ["2048"], feature_extractor_weights_path=empty)
    state = inception.state_dict()
    torch.save({n: 1.4 * random_tensor(n, x) if x.dim() == 4 else x for n, x in state.items()}, folder / INCEPTION)
    return folder
