"""Depth estimator against transformers' DepthAnythingForDepthEstimation and DPTImageProcessor."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import randomize, relative_error
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config, DPTImageProcessor

from layerdecomp.errors import InputError
from layerdecomp.models.depth import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    DepthConfig,
    DepthEstimator,
    input_size,
    preprocess,
)
from layerdecomp.weights import load_depth

TINY = DepthConfig(
    image_size=84,
    embed_dim=24,
    depth=6,
    num_heads=3,
    feature_blocks=[0, 2, 3, 4],
    neck_widths=[6, 8, 10, 12],
    fusion_width=8,
    head_width=4,
)


def reference_config(config: DepthConfig) -> DepthAnythingConfig:
    backbone = Dinov2Config(
        image_size=config.image_size,
        patch_size=config.patch_size,
        hidden_size=config.embed_dim,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        out_indices=[block + 1 for block in config.feature_blocks],  # index 0 is the input of the first block
        reshape_hidden_states=False,
    )
    return DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=config.patch_size,
        reassemble_hidden_size=config.embed_dim,
        neck_hidden_sizes=config.neck_widths,
        fusion_hidden_size=config.fusion_width,
        head_hidden_size=config.head_width,
    )


def build_reference(config: DepthConfig = TINY) -> DepthAnythingForDepthEstimation:
    """Random parameters, with embeddings as large as the patches, so that errors in them show."""
    reference = DepthAnythingForDepthEstimation(reference_config(config)).eval()
    randomize(reference)
    embeddings = reference.backbone.embeddings
    generator = torch.Generator().manual_seed(1)
    for parameter in (embeddings.cls_token, embeddings.mask_token, embeddings.position_embeddings):
        parameter.data.normal_(generator=generator)
    reference.head.conv3.bias.data.fill_(0.2)  # both positive and zero depths
    return reference


@pytest.fixture(scope="module")
def reference() -> DepthAnythingForDepthEstimation:
    return build_reference()


@pytest.fixture(scope="module")
def path(reference: DepthAnythingForDepthEstimation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference's weights as transformers writes them; do not modify the file."""
    folder = tmp_path_factory.mktemp("depth")
    reference.save_pretrained(folder)
    return folder / "model.safetensors"


def images(batch: int, height: int, width: int) -> Tensor:
    """RGB in [-1, 1]: noise over slow waves."""
    generator = torch.Generator().manual_seed(height)
    coarse = torch.randn(batch, 3, 4, 4, generator=generator)
    waves = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    return (waves + 0.2 * torch.randn(waves.shape, generator=generator)).clamp(-1, 1)


def test_full_size_matches_the_published_small_model() -> None:
    with torch.device("meta"):
        model = DepthEstimator(DepthConfig())
        reference = DepthAnythingForDepthEstimation(reference_config(DepthConfig()))
    counts = [sum(parameter.numel() for parameter in m.parameters()) for m in (model, reference)]
    assert counts == [24_785_089, 24_785_089]
    assert model.backbone.pos_embed.shape == (1, 1370, 384)


@pytest.mark.parametrize(
    ("height", "width"), [(84, 84), (56, 126), (28, 42), (70, 140)], ids=["native", "as many", "fewer", "more"]
)
@torch.no_grad()
def test_depth_equals_transformers(
    reference: DepthAnythingForDepthEstimation, path: Path, height: int, width: int
) -> None:
    x = images(2, height, width)
    expected = reference(x).predicted_depth
    depth = load_depth(path, TINY)(x)
    assert depth.shape == (2, height, width) and depth.min() >= 0
    assert (expected > 0).float().mean() > 0.5 and expected.std() > 0.01
    assert relative_error(depth, expected) < 1e-5


def test_a_file_with_the_published_names_loads_frozen(path: Path) -> None:
    published = load_file(path)
    assert "backbone.encoder.layer.0.attention.attention.query.weight" in published
    model = load_depth(path, TINY)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert sum(tensor.numel() for tensor in published.values()) == sum(p.numel() for p in model.parameters())
    assert model.backbone.mask_token.equal(published["backbone.embeddings.mask_token"])


@torch.no_grad()
def test_bf16_is_near_float32(path: Path) -> None:
    model = load_depth(path, TINY, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    x = images(1, 60, 90)
    estimate, expected = model.estimate(x), load_depth(path, TINY).estimate(x)
    assert estimate.dtype == torch.float32
    assert (estimate - expected).abs().mean() < 0.05 < expected.std()


@pytest.mark.parametrize(
    ("height", "width"), [(600, 800), (800, 533), (300, 400), (400, 600), (518, 518), (37, 64), (640, 519)]
)
def test_preprocessing_equals_transformers(height: int, width: int) -> None:
    pixels = ((0.5 * images(1, height, width) + 1) * 127.5).round().byte()
    settings = {
        "size": {"height": 518, "width": 518},
        "ensure_multiple_of": 14,
        "keep_aspect_ratio": True,
        "resample": 3,  # bicubic
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    in_levels = DPTImageProcessor(**settings)(list(pixels), return_tensors="pt").pixel_values
    exact = DPTImageProcessor(**settings, do_rescale=False)(list(pixels / 255), return_tensors="pt").pixel_values
    actual = preprocess(pixels / 127.5 - 1, DepthConfig())
    assert relative_error(actual, exact) < 1e-5
    # given whole levels, transformers rounds to whole levels twice: after columns and after rows
    assert (actual - in_levels).abs().max() < 1.25 / 255 / 0.224


def test_preprocessing_does_not_overshoot() -> None:
    stripes = torch.ones(1, 3, 20, 30)
    stripes[..., ::5] = -1
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    restored = preprocess(stripes, TINY) * std + mean
    assert restored.min() > -1e-6 and restored.max() < 1 + 1e-6 and restored.std() > 0.1


def test_large_images_get_a_short_side_of_518_in_whole_patches() -> None:
    assert input_size(1036, 2072, DepthConfig()) == (518, 1036)
    assert input_size(1200, 900, DepthConfig()) == (686, 518)
    assert input_size(3, 2000, DepthConfig()) == (14, 518)


@pytest.mark.parametrize(("height", "width"), [(84, 84), (50, 70), (300, 200)], ids=["as is", "small", "large"])
@torch.no_grad()
def test_estimates_are_scaled_per_image(
    reference: DepthAnythingForDepthEstimation, path: Path, height: int, width: int
) -> None:
    model = load_depth(path, TINY)
    x = images(2, height, width)
    estimate = model.estimate(x)
    assert estimate.shape == (2, 1, height, width)
    assert estimate.amin((1, 2, 3)).tolist() == [-1, -1] and estimate.amax((1, 2, 3)).tolist() == [1, 1]
    assert relative_error(model.estimate(x[1:]), estimate[1:]) < 1e-5
    for depth, scaled in zip(reference(preprocess(x, TINY)).predicted_depth, estimate[:, 0], strict=True):
        depth = torch.nn.functional.interpolate(depth[None, None], (height, width), mode="bicubic", antialias=True)
        assert np.corrcoef(depth.flatten(), scaled.flatten())[0, 1] > 0.9999  # not inverted


@pytest.mark.parametrize("value", [-1.0, 0.0, 0.3, 7.7])
def test_constant_depth_gives_zero(path: Path, value: float) -> None:
    model = load_depth(path, TINY)
    model.head.conv3.weight.zero_()
    model.head.conv3.bias.fill_(value)
    assert not model.estimate(images(2, 50, 70)).any()


@pytest.mark.parametrize("spread", [1e-3, 1e-4])
def test_almost_constant_depth_is_scaled(path: Path, spread: float) -> None:
    model = load_depth(path, TINY)
    model.head.conv3.weight *= spread
    model.head.conv3.bias.fill_(7.7)
    estimate = model.estimate(images(1, 50, 70))
    assert (estimate.min(), estimate.max()) == (-1, 1)


def _without(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda state: state.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("head.conv3.bias"), "1 missing: head.conv3.bias"),
        (
            _without("backbone.encoder.layer.5.attention.attention.key.bias"),
            "1 missing: backbone.encoder.layer.5.attention.attention.key.bias",
        ),
        (lambda state: state.update(surplus=torch.zeros(1)), "1 unexpected: surplus"),
        (
            lambda state: state.update({"backbone.encoder.layer.0.attention.attention.value.bias": torch.zeros(25)}),
            r"1 of another shape: backbone.encoder.layer.0.attention.attention.value.bias \[25\] for \[24\]",
        ),
    ],
    ids=["missing", "missing part", "unexpected", "misshaped part"],
)
def test_tensors_that_do_not_fit_are_rejected(
    path: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    state, changed = load_file(path), tmp_path / "changed.safetensors"
    change(state)
    save_file(state, changed)
    with pytest.raises(InputError, match=message) as error:
        load_depth(changed, TINY)
    assert str(error.value).startswith(f"{changed} does not fit this DepthEstimator")
    assert len(str(error.value).splitlines()) == 2


def test_a_truncated_file_is_rejected(path: Path, tmp_path: Path) -> None:
    content, cut = path.read_bytes(), tmp_path / "cut.safetensors"
    cut.write_bytes(content[:-100])
    with pytest.raises(InputError, match="truncated") as error:
        load_depth(cut, TINY)
    assert str(cut) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 80}, "patch_size = 14 does not divide image_size = 80"),
        ({"num_heads": 5}, "num_heads = 5 does not divide embed_dim = 24"),
        ({"neck_widths": [6, 8]}, r"neck_widths is \[6, 8\]; expected 4"),
        ({"feature_blocks": [0, 2, 4, 6]}, "expected rising numbers of blocks, 0 to 5"),
        ({"feature_blocks": [0, 2, 2, 4]}, "expected rising"),
    ],
)
def test_invalid_sizes_are_rejected(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(TINY, **change)
