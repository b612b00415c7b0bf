"""The whole decomposer: layers of any size, reproducible, that depend on exactly the inputs they should."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import RGB, RGBA, fill
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from layerdecomp.comparison import load_models
from layerdecomp.conditioning import pack
from layerdecomp.data.datamodule import collate
from layerdecomp.data.scenes import SceneConfig, Scenes
from layerdecomp.decomposer import Decomposer, build_decomposer
from layerdecomp.errors import InputError
from layerdecomp.flow import FlowConfig
from layerdecomp.imaging.compositing import to_autoencoder
from layerdecomp.imaging.cues import CUES, compute_cues
from layerdecomp.imaging.geometry import grow_and_feather, to_tensor
from layerdecomp.imaging.layers import Layers
from layerdecomp.inpainting import inpaint, token_ids
from layerdecomp.manifest import DecomposerConfig, open_adapter
from layerdecomp.metrics.background import psnr
from layerdecomp.metrics.foreground import alpha_iou
from layerdecomp.models.autoencoder import Autoencoder, Tiling
from layerdecomp.models.context_fusion import ContextFusionConfig
from layerdecomp.models.depth import DepthConfig, DepthEstimator
from layerdecomp.models.lora import LoRAConfig, LoRALinear, inject_lora
from layerdecomp.models.mmdit import MMDiT
from layerdecomp.resizing import keep_pixels
from layerdecomp.sampling import schedule
from layerdecomp.weights import Adapter, load_mmdit, save_model

SIZES = [(32, 48), (37, 53), (17, 16), (1, 20), (300, 200)]
STEPS = 2


def picture(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def box(height: int, width: int) -> NDArray[np.bool_]:
    """The mask of an object near the centre, an eighth of each side."""
    mask = np.zeros((height, width), bool)
    mask[height // 2 : height // 2 + max(1, height // 8), width // 2 : width // 2 + max(1, width // 8)] = True
    return mask


def changed(decomposer: Decomposer, **sample: object) -> Decomposer:
    """The same models with other sampling settings."""
    other = copy.copy(decomposer)
    other.sample = replace(decomposer.sample, **sample)  # type: ignore[arg-type]
    return other


def batch_of(count: int, size: int = 32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    image = torch.rand(count, 3, size, size, generator=generator) * 2 - 1
    mask = torch.zeros(count, 1, size, size)
    for index in range(count):
        mask[index, :, 4 * index : 4 * index + 9, 8:20] = 1
    cues = torch.rand(count, len(CUES), 3, size, size, generator=generator) * 2 - 1
    present = torch.zeros(3, len(CUES), dtype=torch.bool)
    present[0, :2] = present[1, 0] = True
    return {"image": image, "mask": mask, "cues": cues, "cues_present": present[:count]}


def noise_of(count: int, size: int = 32) -> Tensor:
    return torch.randn(count, 2, 16, size // 8, size // 8, generator=torch.Generator().manual_seed(6))


def inpaint_with(decomposer: Decomposer, batch: dict[str, Tensor], noise: Tensor) -> Tensor:
    """The image inpainted with the parts and the settings of a decomposer."""
    return inpaint(
        transformer=decomposer.transformer,
        autoencoder=decomposer.autoencoder,
        prompt=decomposer.prompt,
        image=batch["image"],
        mask=batch["mask"],
        noise=noise,
        conditioning=decomposer.conditioning,
        flow=decomposer.flow,
        sample=decomposer.sample,
    )


def differ(first: Layers, second: Layers) -> bool:
    return bool((first.background != second.background).any() and (first.foreground != second.foreground).any())


@pytest.mark.parametrize("size", SIZES)
def test_layers_have_the_size_of_the_image(tiny_decomposer: Decomposer, size: tuple[int, int]) -> None:
    image, mask = picture(*size), box(*size)
    layers = changed(tiny_decomposer, max_side=64).decompose(image, mask, steps=STEPS)
    assert layers.background.shape == (*size, 3) and layers.background.dtype == np.uint8
    assert layers.foreground.shape == (*size, 4) and layers.foreground.dtype == np.uint8
    np.testing.assert_array_equal(layers.image, image)
    np.testing.assert_array_equal(layers.mask, mask)
    if min(size) > 1:
        assert layers.background[mask].std() > 0 and layers.foreground[..., 3].std() > 0


@pytest.mark.parametrize("size", [(48, 2048), (601, 19), (5, 17), (17, 5), (1, 2)])
def test_extreme_sizes_give_layers_of_the_same_size(tiny_decomposer: Decomposer, size: tuple[int, int]) -> None:
    """Up to 2048 without shrinking, and larger than a tile along one side."""
    image, mask = picture(*size), box(*size)
    drawn = changed(tiny_decomposer, max_side=2048, tile=512, tile_overlap=128)
    layers = drawn.decompose(image, mask, steps=1)
    assert layers.background.shape == (*size, 3) and layers.foreground.shape == (*size, 4)
    if min(size) > 4:
        assert layers.foreground[..., 3].std() > 0
    if 512 < max(size) < 2048:
        whole = changed(tiny_decomposer, max_side=2048, tile=2048).decompose(image, mask, steps=1)
        assert (whole.foreground != layers.foreground).any()  # the norms see different pixels


def test_a_batch_rejects_images_of_different_sizes(tiny_decomposer: Decomposer) -> None:
    prepared = [tiny_decomposer.prepare(picture(*size), box(*size)) for size in ((32, 48), (37, 53), (30, 40))]
    assert [one.size for one in prepared] == [(32, 48), (48, 64), (32, 48)]
    first, third = tiny_decomposer.decompose_batch([prepared[0], prepared[2]], steps=1)
    assert first.foreground.shape == (32, 48, 4) and third.background.shape == (30, 40, 3)
    with pytest.raises(InputError, match=r"images of 48 x 32 and of 64 x 48 pixels; expected one size"):
        tiny_decomposer.decompose_batch(prepared[:2], steps=1)


def test_the_seed_and_steps_determine_the_layers(tiny_decomposer: Decomposer) -> None:
    image, mask = picture(32, 48), box(32, 48)
    first, again, other = (tiny_decomposer.decompose(image, mask, steps=STEPS, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.background, again.background)
    np.testing.assert_array_equal(first.foreground, again.foreground)
    assert differ(first, other)
    assert differ(first, tiny_decomposer.decompose(image, mask, steps=STEPS + 1))


@pytest.mark.parametrize("size", [(64, 96), (160, 240)])
def test_the_background_keeps_the_pixels_beyond_the_object(tiny_decomposer: Decomposer, size: tuple[int, int]) -> None:
    decomposer = changed(tiny_decomposer, max_side=96)
    image, mask = picture(*size), box(*size)
    kept = decomposer.decompose(image, mask, steps=STEPS)
    found = mask | (kept.foreground[..., 3] >= 127)  # the mask, and any part of the object that it missed
    inside, near = (
        grow_and_feather(
            torch.from_numpy(place).float()[None, None], decomposer.sample.grow, decomposer.sample.feather
        )[0, 0].numpy()
        for place in (mask, found)
    )
    inside, elsewhere = inside == 1, near == 0
    assert elsewhere.mean() > 0.5 and inside[mask].all()
    np.testing.assert_array_equal(kept.background[elsewhere], image[elsewhere])
    generated = changed(decomposer, keep_pixels=False).decompose(image, mask, steps=STEPS)
    np.testing.assert_array_equal(generated.foreground, kept.foreground)
    np.testing.assert_array_equal(generated.background[inside], kept.background[inside])
    assert (generated.background[elsewhere] != image[elsewhere]).mean() > 0.5


@pytest.mark.parametrize("line", [lambda m: m[:, 70:71], lambda m: m[30:31], lambda m: m[50:51, 60:61]])
def test_a_thin_object_survives_shrinking(
    tiny_decomposer: Decomposer, monkeypatch: pytest.MonkeyPatch, line: Callable[[NDArray[np.bool_]], NDArray[np.bool_]]
) -> None:
    decomposer, seen = changed(tiny_decomposer, max_side=32), []
    draw = decomposer.draw

    def record(batch: dict[str, Tensor], *args: object) -> tuple[Tensor, Tensor]:
        seen.append(batch["mask"])
        return draw(batch, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(decomposer, "draw", record, raising=False)
    mask = np.zeros((200, 140), bool)
    line(mask)[:] = True
    decomposer.decompose(picture(200, 140), mask, steps=1)
    (small,) = seen
    assert small.unique().tolist() == [0, 1]
    extent = torch.tensor(mask.shape) * 32 / 200
    wide = torch.from_numpy(np.argwhere(mask)).float()
    expected = ((wide.amax(0) - wide.amin(0)) / torch.tensor(mask.shape) * extent).round()
    found = torch.argwhere(small[0, 0]).float()
    assert ((found.amax(0) - found.amin(0)) >= expected - 2).all(), "parts of the line are gone"


def test_given_cues_replace_the_computed_ones(tiny_decomposer: Decomposer) -> None:
    image, mask = picture(32, 48), box(32, 48)
    cues = np.random.default_rng(1).uniform(-1, 1, (len(CUES), 3, 32, 48)).astype(np.float32)
    computed = tiny_decomposer.decompose(image, mask, steps=STEPS)
    given = tiny_decomposer.decompose(image, mask, steps=STEPS, cues=cues)
    assert differ(computed, given) and differ(given, tiny_decomposer.decompose(image, mask, steps=STEPS, cues=-cues))
    np.testing.assert_array_equal(
        given.foreground, tiny_decomposer.decompose(image, mask, steps=STEPS, cues=cues).foreground
    )


def test_a_depth_estimator_adds_the_depth_cue(tiny_decomposer: Decomposer) -> None:
    config = DepthConfig(
        image_size=28, embed_dim=24, depth=6, num_heads=3, feature_blocks=[0, 2, 3, 4], neck_widths=[6, 8, 10, 12]
    )
    estimator = DepthEstimator(config).eval()
    fill(estimator, seed=0)
    estimator.head.conv3.bias.data.fill_(5.0)  # the final ReLU clips negative depths
    image, mask = picture(64, 96), box(64, 96)
    with_depth = tiny_decomposer.decompose(image, mask, steps=STEPS, depth=estimator)
    assert differ(with_depth, tiny_decomposer.decompose(image, mask, steps=STEPS))
    maps = compute_cues(image, {"depth": estimator.estimate(to_tensor(image))[0].numpy()})[0]
    given = tiny_decomposer.decompose(image, mask, steps=STEPS, cues=maps)
    np.testing.assert_array_equal(given.foreground, with_depth.foreground)


CUE_MAPS = np.zeros((len(CUES), 3, 32, 48), np.float32)


@pytest.mark.parametrize(
    ("cues", "found"),
    [
        (CUE_MAPS[0], r"float32 of shape \(3, 32, 48\)"),
        (CUE_MAPS[:2], r"float32 of shape \(2, 3, 32, 48\)"),
        (CUE_MAPS[:, :1], r"float32 of shape \(3, 1, 32, 48\)"),
        (CUE_MAPS[..., :40], r"float32 of shape \(3, 3, 32, 40\)"),
        (CUE_MAPS.astype(np.uint8), "uint8 of shape"),
        (CUE_MAPS + 255, "values from 255 to 255"),
        (CUE_MAPS * np.nan, "values from nan to nan"),
        (torch.from_numpy(CUE_MAPS), "Tensor"),
        (CUE_MAPS.tolist(), "list"),
    ],
)
def test_invalid_cues_are_rejected(tiny_decomposer: Decomposer, cues: Any, found: str) -> None:
    expected = rf"cues: found {found}.*; expected .* \[-1, 1\] of shape \(3, 3, 32, 48\), the maps edge, segmentation"
    with pytest.raises(InputError, match=expected):
        tiny_decomposer.decompose(picture(32, 48), box(32, 48), cues=cues)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_cues_with_negative_strides_and_of_any_precision_are_accepted(tiny_decomposer: Decomposer, dtype: Any) -> None:
    tiny_decomposer.decompose(picture(32, 48), box(32, 48), steps=1, cues=CUE_MAPS[..., ::-1].astype(dtype, copy=False))


@pytest.mark.parametrize("steps", [0, -3, 1.5, "2"])
def test_invalid_steps_are_rejected(tiny_decomposer: Decomposer, steps: Any) -> None:
    with pytest.raises(InputError, match=f"steps is {steps!r}; expected a whole number from 1"):
        tiny_decomposer.decompose(picture(32, 48), box(32, 48), steps=steps)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, None, "1"])
def test_invalid_seeds_are_rejected(tiny_decomposer: Decomposer, seed: Any) -> None:
    with pytest.raises(InputError, match=f"seed is {seed!r}; expected a whole number from 0"):
        tiny_decomposer.decompose(picture(32, 48), box(32, 48), seed=seed)


def test_numpy_integers_are_accepted(tiny_decomposer: Decomposer) -> None:
    image, mask = picture(32, 48), box(32, 48)
    ours, numpys = (tiny_decomposer.decompose(image, mask, steps=to(2), seed=to(3)) for to in (int, np.int64))
    np.testing.assert_array_equal(ours.foreground, numpys.foreground)


@pytest.mark.parametrize(("images", "found"), [([], "nothing"), ([picture(32, 48)], "ndarray"), (None, "NoneType")])
def test_a_batch_of_unprepared_images_is_rejected(tiny_decomposer: Decomposer, images: Any, found: str) -> None:
    with pytest.raises(InputError, match=f"images holds {found}; expected a list of one or more results of `prepare`"):
        tiny_decomposer.decompose_batch(images)


def test_fusion_can_be_disabled(tiny_config: DecomposerConfig, tiny_weights: Path) -> None:
    config = replace(tiny_config, fusion=ContextFusionConfig(enabled=False))
    decomposer = build_decomposer(config).requires_grad_(False).eval()
    assert decomposer.context_fusion is None and not any("fusion" in name for name in decomposer.state_dict())
    batch = batch_of(2)
    context = decomposer.encode(batch["image"], batch["mask"])
    assert context.fused is None and context.img_cond.shape == (2, 8, 320)
    assert decomposer.decompose(picture(32, 48), box(32, 48), steps=1).foreground.shape == (32, 48, 4)


def test_context_latents_velocity_and_layers_have_the_expected_shapes(tiny_decomposer: Decomposer) -> None:
    batch = batch_of(3)
    context = tiny_decomposer.encode(*batch.values())
    assert context.img_cond.shape == (3, 8, 320) and context.ids.shape == (8, 3)
    assert context.ids[:, 0].tolist() == [0] * 4 + [1] * 4
    assert context.fused is not None and context.fused.shape == (3, 4, 32)
    foreground = torch.cat([batch["image"], batch["mask"]], 1)
    _, z = tiny_decomposer.encode_sample(batch["image"], batch["mask"], batch["cues"], batch["image"], foreground)
    assert z.shape == (3, 8, 64)
    assert tiny_decomposer.velocity(z, context, torch.full((3,), 0.5)).shape == z.shape
    background, foreground = tiny_decomposer.draw(batch, noise_of(3), steps=1)
    assert background.shape == (3, 3, 32, 32) and foreground.shape == (3, 4, 32, 32)
    assert background.abs().max() <= 1 and foreground[:, 3].min() >= 0 and foreground[:, 3].max() <= 1


def test_encoding_a_sample_equals_encoding_its_parts(tiny_decomposer: Decomposer) -> None:
    batch = batch_of(3)
    background, foreground = batch["image"].flip(-1), torch.cat([batch["image"], batch["mask"]], 1)
    encoded, z = tiny_decomposer.encode_sample(batch["image"], batch["mask"], batch["cues"], background, foreground)
    alone = tiny_decomposer.encode_images(batch["image"], batch["mask"], batch["cues"])
    torch.testing.assert_close(encoded, alone, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        z_b = tiny_decomposer.autoencoder.encode(background)
        z_f = tiny_decomposer.rgba_autoencoder.encode(to_autoencoder(foreground))
    torch.testing.assert_close(z, torch.cat([pack(z_b), pack(z_f)], dim=1), rtol=1e-4, atol=1e-5)


def test_compiled_encoders_give_the_same_latents_and_parameter_names(tiny_config: DecomposerConfig) -> None:
    decomposer = build_decomposer(tiny_config).requires_grad_(False).eval()
    names, batch = [*decomposer.state_dict()], batch_of(3)
    sample = batch["image"], batch["mask"], batch["cues"], batch["image"], torch.cat([batch["image"], batch["mask"]], 1)
    expected = decomposer.encode_sample(*sample)
    for autoencoder in (decomposer.autoencoder, decomposer.rgba_autoencoder):
        autoencoder.encode_batch_size = 1
    torch._dynamo.utils.counters.clear()
    decomposer.compile_parts(backend="aot_eager")
    for rows in (3, 2):
        found = decomposer.encode_sample(*(tensor[:rows] for tensor in sample))
        for ours, whole in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, whole[:rows], rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # one per encoder, whatever the batch size
    assert [*decomposer.state_dict()] == names


def test_each_layer_is_conditioned_only_on_its_own_pixels(tiny_decomposer: Decomposer) -> None:
    """The background never sees the object; the foreground sees only the object."""
    batch = batch_of(2)
    img_cond = tiny_decomposer.encode(*batch.values()).img_cond
    for inside, same in ((True, slice(0, 4)), (False, slice(4, 8))):
        place = batch["mask"] if inside else 1 - batch["mask"]
        altered = {**batch, "image": batch["image"] * (1 - place) - 0.7 * place}
        other = tiny_decomposer.encode(*altered.values()).img_cond
        assert other[:, same].equal(img_cond[:, same]) and not other.equal(img_cond)


def test_every_call_of_an_autoencoder_is_tiled_as_configured(tiny_decomposer: Decomposer) -> None:
    decomposer, batch = changed(tiny_decomposer, steps=1, tile=64, tile_overlap=24), batch_of(1)
    with mock.patch.object(Autoencoder, "_in_tiles", autospec=True, side_effect=Autoencoder._in_tiles) as run:
        decomposer.encode_sample(
            *(batch[name] for name in ("image", "mask", "cues", "image")), torch.rand(1, 4, 32, 32)
        )
        decomposer.draw(batch, noise_of(1))
        inpaint_with(decomposer, batch, noise_of(1)[:, 0])
    assert [call.args[3] for call in run.call_args_list] == 7 * [Tiling(64, 24)]


def test_what_is_cached_while_sampling_can_be_used_in_training(tiny_weights: Path) -> None:
    prompt = Decomposer.from_pretrained(tiny_weights / "adapter.safetensors").prompt
    with torch.inference_mode():
        cached = [*prompt.inputs(2, torch.bfloat16).values(), token_ids(torch.empty(1, 3, 48, 176), 0, 1)]
    assert not any(tensor.is_inference() for tensor in cached)


def test_the_chosen_cues_are_encoded_in_their_order(tiny_config: DecomposerConfig) -> None:
    fusion = replace(tiny_config.fusion, cues=["depth", "edge"])
    decomposer, batch = build_decomposer(replace(tiny_config, fusion=fusion)), batch_of(2)
    present = torch.tensor([[True, False, True], [False, True, False]])
    with mock.patch.object(decomposer.context_fusion, "forward", return_value=None) as forward, torch.no_grad():
        decomposer.encode(batch["image"], batch["mask"], batch["cues"], present)
        expected = [pack(decomposer.autoencoder.encode(batch["cues"][:, cue])) for cue in (2, 0)]
    tokens, chosen, ids = forward.call_args.args
    torch.testing.assert_close(tokens, torch.stack(expected, dim=1), rtol=1e-4, atol=1e-5)
    assert chosen.tolist() == [[True, True], [False, False]] and ids.shape == (4, 3)


def test_only_cues_that_the_fusion_uses_are_computed(tiny_config: DecomposerConfig) -> None:
    decomposer = build_decomposer(replace(tiny_config, fusion=replace(tiny_config.fusion, cues=["edge"])))
    depth: Any = mock.Mock()
    inputs = decomposer.prepare(picture(64, 96), box(64, 96), depth=depth).inputs
    assert inputs["cues_present"].tolist() == [[name == "edge" for name in CUES]]
    depth.estimate.assert_not_called()


def test_absent_cues_have_no_influence(tiny_decomposer: Decomposer) -> None:
    batch, noise = batch_of(3), noise_of(3)
    absent = ~batch["cues_present"][:, :, None, None, None]
    altered = {**batch, "cues": torch.where(absent, batch["cues"] + 5, batch["cues"])}
    first, second = (tiny_decomposer.draw(b, noise, steps=STEPS) for b in (batch, altered))
    assert first[0].equal(second[0]) and first[1].equal(second[1])


def test_a_sample_does_not_depend_on_the_rest_of_its_batch(tiny_decomposer: Decomposer) -> None:
    batch, noise = batch_of(3), noise_of(3)
    together = tiny_decomposer.draw(batch, noise, steps=STEPS)
    for index in range(3):
        one = slice(index, index + 1)
        alone = tiny_decomposer.draw({name: value[one] for name, value in batch.items()}, noise[one], steps=STEPS)
        for whole, single in zip(together, alone, strict=True):
            assert single.std() > 0.05
            torch.testing.assert_close(whole[one], single, atol=2e-4, rtol=1e-3)


def test_sampled_alphas_are_snapped_by_the_margin(tiny_decomposer: Decomposer) -> None:
    plain, snapped = (
        changed(tiny_decomposer, steps=1, alpha_margin=margin).draw(batch_of(2), noise_of(2))[1][:, 3]
        for margin in (0.0, 0.25)
    )
    torch.testing.assert_close(snapped, ((plain - 0.25) / 0.5).clamp(0, 1))
    assert not snapped.equal(plain)


def test_every_trained_part_matters(tiny_decomposer: Decomposer) -> None:
    batch, noise = batch_of(3), noise_of(3)
    expected = tiny_decomposer.draw(batch, noise, steps=STEPS)

    def without(alter: Callable[[Decomposer], None]) -> tuple[Tensor, Tensor]:
        decomposer = copy.deepcopy(tiny_decomposer)
        alter(decomposer)
        return decomposer.draw(batch, noise, steps=STEPS)

    def no_lora(decomposer: Decomposer) -> None:
        for module in decomposer.transformer.modules():
            if isinstance(module, LoRALinear):
                module.lora_B.weight.zero_()

    def no_queries(decomposer: Decomposer) -> None:
        assert decomposer.context_fusion is not None
        decomposer.context_fusion.queries.zero_()

    for alter in (no_lora, no_queries, lambda decomposer: decomposer.transformer.img_in.weight.zero_()):
        for layer, altered in zip(expected, without(alter), strict=True):
            assert (layer - altered).abs().mean() > 1e-3


def test_an_adapter_holds_only_trained_tensors(tiny_config: DecomposerConfig) -> None:
    decomposer = build_decomposer(tiny_config)
    base = load_mmdit(tiny_config.weights.transformer).state_dict()
    names = decomposer.adapter({}).tensors.keys()
    assert {name for name in names if name in base} == {"img_in.weight", "img_in.bias"}
    assert all(p.dtype == torch.float32 and p.requires_grad for p in decomposer.adapter({}).tensors.values())
    assert sum(p.requires_grad for p in decomposer.parameters()) == len(names)


class Shift(torch.nn.Module):
    """A new layer after `final_layer`."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(()))
        self.adapted = True

    def forward(self, _: Any, __: Any, x: torch.Tensor) -> torch.Tensor:
        return x + self.shift if self.adapted else x


def adapt_further(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a user may add to `adapt`: a layer of the base that is trained in full, and a new one."""

    def inject(transformer: MMDiT, lora: LoRAConfig) -> None:
        inject_lora(transformer, lora)
        transformer.final_layer.requires_grad_(True)
        transformer.new = Shift()
        transformer.final_layer.register_forward_hook(transformer.new)

    monkeypatch.setattr("layerdecomp.decomposer.inject_lora", inject)


def test_trained_parameters_of_a_bf16_base_are_float32(
    tiny_config: DecomposerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapt_further(monkeypatch)
    decomposer = build_decomposer(tiny_config, dtype=torch.bfloat16)
    trained = decomposer.adapter({}).tensors
    assert "final_layer.linear.weight" in trained and {p.dtype for p in trained.values()} == {torch.float32}
    assert decomposer.transformer.txt_in.weight.dtype == torch.bfloat16
    assert decomposer.digest()


def test_a_merged_decomposer_has_neither_an_adapter_nor_a_frozen_base(
    tiny_config: DecomposerConfig, tiny_weights: Path
) -> None:
    decomposer, base = Decomposer.from_pretrained(tiny_weights / "adapter.safetensors"), tiny_config.weights.transformer
    decomposer.merge()
    for use in (lambda: decomposer.adapter({}), decomposer.digest, lambda: decomposer.frozen_base(base)):
        with pytest.raises(InputError, match="has been merged into its base; load the adapter again"):
            use()


def test_a_new_trained_layer_is_saved_and_loaded_and_is_not_part_of_the_frozen_base(
    tiny_config: DecomposerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapt_further(monkeypatch)
    decomposer, path = build_decomposer(tiny_config), tmp_path / "adapter.safetensors"
    with torch.no_grad():
        for parameter in (*decomposer.transformer.final_layer.parameters(), decomposer.transformer.new.shift):
            parameter.add_(1)
    decomposer.adapter(tiny_config.to_metadata()).save(path)
    assert {"final_layer.linear.weight", "final_layer.linear.bias", "new.shift"} <= load_file(path).keys()
    loaded, base = Decomposer.from_pretrained(path), load_mmdit(tiny_config.weights.transformer)
    assert loaded.digest() == decomposer.digest() and (loaded.transformer.new.shift == 1).all()
    inputs = {
        **{"img": torch.randn(1, 4, base.config.in_channels), "img_ids": torch.zeros(4, 3)},
        **{"timesteps": torch.ones(1), **loaded.prompt.inputs(1, torch.float32)},
    }
    velocity = loaded.frozen_base(tiny_config.weights.transformer)(**inputs)
    assert velocity.equal(base(**inputs)) and not velocity.equal(loaded.transformer(**inputs))


def test_a_loaded_adapter_equals_its_file_and_determines_the_digest(tiny_weights: Path) -> None:
    path = tiny_weights / "adapter.safetensors"
    decomposer = Decomposer.from_pretrained(path)  # all its parameters are frozen
    found, expected = decomposer.adapter({}).tensors, load_file(path)
    assert found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in expected)
    before = decomposer.digest()
    decomposer.load_adapter(Adapter({name: tensor + 1 for name, tensor in expected.items()}, {}), "elsewhere")
    assert decomposer.digest() != before == Decomposer.from_pretrained(path).digest()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": LoRAConfig(rank=2, targets=["*"])}, r"lora.targets \['\*'\] match img_in, .* trained in full"),
        ({"fusion": ContextFusionConfig(num_queries=4, num_heads=2, in_channels=32)}, "in_channels is 32; expected 64"),
        ({"fusion": ContextFusionConfig(num_queries=4, num_heads=2, cues=["edges"])}, "fusion.cues names 'edges'"),
    ],
)
def test_settings_that_do_not_fit_the_frozen_models_are_rejected(
    tiny_config: DecomposerConfig, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        build_decomposer(replace(tiny_config, **changes))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("autoencoder", {"in_channels": 4}, "of 4 channels, expected 3: 3 for RGB"),
        ("autoencoder", {"ch_mult": [1, 2, 2]}, "of 4 pixels per latent, expected 8: four levels in ch_mult"),
        ("rgba_autoencoder", {"ch_mult": [1, 2, 2]}, "of 4 pixels per latent, expected 8: four levels in ch_mult"),
        ("rgba_autoencoder", {"z_channels": 8}, "of 8 latent channels, expected 16: those of the RGB autoencoder"),
    ],
)
def test_autoencoders_with_other_latents_are_rejected(
    tiny_config: DecomposerConfig, tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    path = str(tmp_path / "other.safetensors")
    save_model(path, Autoencoder(replace(RGB if name == "autoencoder" else RGBA, **changes)), {})
    with pytest.raises(InputError, match=f"{path} is an autoencoder {message}"):
        build_decomposer(replace(tiny_config, weights=replace(tiny_config.weights, **{name: path})))


def test_missing_files_are_reported_before_the_transformer_is_loaded(
    tiny_config: DecomposerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerdecomp.decomposer.load_mmdit", lambda *_, **__: pytest.fail("24 GB"))
    for names in (["rgba_autoencoder"], ["prompt"], ["autoencoder", "prompt"]):
        weights = replace(tiny_config.weights, **{name: f"{name}.gone" for name in names})
        expected = "; ".join(f"{name}.gone does not exist" for name in names)
        with pytest.raises(InputError, match=f"^{expected}; put the file there"):
            build_decomposer(replace(tiny_config, weights=weights))


def test_float16_is_rejected(tiny_weights: Path) -> None:
    with pytest.raises(InputError, match="dtype is torch.float16; expected torch.float32 or torch.bfloat16"):
        Decomposer.from_pretrained(tiny_weights / "adapter.safetensors", dtype=torch.float16)


@pytest.mark.parametrize(
    ("device", "expected"),
    [("cpu", torch.float32), ("cpu:0", torch.float32), ("cuda", torch.bfloat16), ("cuda:1", torch.bfloat16)],
)
def test_the_frozen_parts_are_in_bf16_on_accelerators(
    tiny_weights: Path, monkeypatch: pytest.MonkeyPatch, device: str, expected: torch.dtype
) -> None:
    built: list[torch.dtype] = []

    def build(config: DecomposerConfig, *, dtype: torch.dtype, **_: Any) -> Decomposer:
        built.append(dtype)
        return build_decomposer(config)  # on the CPU

    monkeypatch.setattr("layerdecomp.decomposer.check_device", lambda _: None)
    for module in ("decomposer", "comparison"):
        monkeypatch.setattr(f"layerdecomp.{module}.build_decomposer", build)
    path = str(tiny_weights / "adapter.safetensors")
    Decomposer.from_pretrained(path, device=device)
    adapter, config = open_adapter(path)
    load_models(adapter, path, config, device)
    assert built == [expected, expected]


@pytest.mark.parametrize("device", ["cudaa", "meta", 1.5])
def test_unusable_devices_are_rejected(tiny_weights: Path, device: Any) -> None:
    with pytest.raises(InputError, match=f"device={device}: .*; expected cpu, or cuda or mps if available"):
        Decomposer.from_pretrained(tiny_weights / "adapter.safetensors", device=device)


def test_frozen_models_in_bf16_give_nearly_the_same_layers(tiny_weights: Path, tiny_decomposer: Decomposer) -> None:
    decomposer = Decomposer.from_pretrained(tiny_weights / "adapter.safetensors", dtype=torch.bfloat16)
    assert decomposer.transformer.final_layer.linear.weight.dtype == torch.bfloat16
    image, mask = picture(32, 48), box(32, 48)
    half, full = (d.decompose(image, mask, steps=STEPS) for d in (decomposer, tiny_decomposer))
    error = np.abs(half.foreground.astype(float) - full.foreground)
    assert 0 < error.mean() < 8


def test_an_adapter_rejects_another_prompt(tiny_config: DecomposerConfig, tmp_path: Path) -> None:
    files = [tmp_path / "prompt.safetensors", tmp_path / "other.safetensors"]
    for value, file in enumerate(files):
        save_file({"txt": torch.full((5, 8), float(value)), "vec": torch.ones(8)}, file)
    config = replace(tiny_config, weights=replace(tiny_config.weights, prompt=str(files[0])))
    build_decomposer(config).adapter(config.to_metadata()).save(tmp_path / "adapter.safetensors")
    Decomposer.from_pretrained(tmp_path / "adapter.safetensors")
    with pytest.raises(InputError, match="other.safetensors is not the prompt that .* was trained with"):
        Decomposer.from_pretrained(tmp_path / "adapter.safetensors", prompt=str(files[1]))


def test_the_shipped_weights_fit_together_and_find_the_objects() -> None:
    decomposer = Decomposer.from_pretrained("checkpoints/tiny/adapter.safetensors")
    data = Scenes(SceneConfig(), "test", seed=99, length=8)
    batch = collate([data[index] for index in range(8)])
    noise = torch.randn(8, 2, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    background, foreground = decomposer.draw(batch, noise, steps=10)
    kept = keep_pixels(batch["image"], batch["mask"], background, decomposer.sample)
    assert psnr(kept, batch["background"]).mean() > psnr(batch["image"], batch["background"]).mean() + 1
    everything = torch.ones_like(foreground)
    assert alpha_iou(foreground, batch["foreground"]).mean() > 0.4
    assert alpha_iou(everything, batch["foreground"]).mean() < 0.3


def test_merging_changes_only_rounding(tiny_weights: Path) -> None:
    decomposer, merged = (Decomposer.from_pretrained(tiny_weights / "adapter.safetensors") for _ in range(2))
    assert any(isinstance(module, LoRALinear) for module in decomposer.transformer.modules())
    assert not any(isinstance(module, LoRALinear) for module in merged.merge().transformer.modules())
    batch, z, t = (
        batch_of(2),
        torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0.3, 0.9]),
    )
    expected, found = (model.velocity(z, model.encode(*batch.values()), t) for model in (decomposer, merged))
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_times_follow_the_flow_and_the_tokens_of_one_layer(tiny_decomposer: Decomposer) -> None:
    times, batch, noise = [], batch_of(1, 64), noise_of(1, 64)
    decomposer = changed(tiny_decomposer, steps=5)
    decomposer.flow = FlowConfig(base_shift=0.2)

    def velocity(transformer: object, prompt: object, x: Tensor, context: object, t: Tensor, scale: float) -> Tensor:
        times.append(t.item())
        return torch.zeros_like(x)

    with mock.patch("layerdecomp.decomposer.predict_velocity", velocity):
        decomposer.draw(batch, noise)
    with mock.patch("layerdecomp.inpainting.predict_velocity", velocity):
        inpaint_with(decomposer, batch, noise[:, 0])
    assert times == 2 * schedule(5, (64 // 16) ** 2, decomposer.flow)[:-1].tolist()


def test_the_guidance_is_that_of_sampling_unless_given(tiny_decomposer: Decomposer) -> None:
    decomposer, batch, x = changed(tiny_decomposer, guidance=7.0), batch_of(1), torch.zeros(1, 8, 64)
    with mock.patch.object(decomposer.transformer, "forward", return_value=x) as forward:
        decomposer.draw(batch, noise_of(1), steps=1)
        decomposer.velocity(x, decomposer.encode(*batch.values()), torch.ones(1), guidance=0.0)
    assert [call.kwargs["guidance"].tolist() for call in forward.call_args_list] == [[7.0], [0.0]]


@pytest.mark.parametrize("shifts", [(0.0, 0.3, -0.3), (0.0, 0.3)])
def test_the_foreground_is_the_median_of_several_draws(tiny_decomposer: Decomposer, shifts: Sequence[float]) -> None:
    decomposer = changed(tiny_decomposer, alpha_margin=0.0)
    batch, noises = batch_of(2), [noise_of(2) + shift for shift in shifts]
    drawn = [decomposer.draw(batch, noise, steps=STEPS) for noise in noises]
    background, foreground = decomposer.draw(batch, torch.cat(noises, dim=1), steps=STEPS)
    torch.testing.assert_close(background, drawn[0][0])
    alphas = torch.stack([layer[:, 3] for _, layer in drawn])
    assert alphas.std(0).max() > 0.01
    torch.testing.assert_close(foreground[:, 3], alphas.quantile(0.5, 0), rtol=0, atol=1e-5)
