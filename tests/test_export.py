"""Exported adapters, loaded by their targets: diffusers, ComfyUI's key names, merged weights, published folders."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fill, same
from diffusers import FluxFillPipeline
from diffusers.utils import logging as diffusers_logging
from reference import build_reference_transformer, diffusers_output, output_error
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from layerdecomp import modelcard
from layerdecomp.decomposer import Decomposer, build_decomposer
from layerdecomp.errors import InputError
from layerdecomp.export import FORMATS, export
from layerdecomp.manifest import DecomposerConfig
from layerdecomp.models.context_fusion import ContextFusionConfig
from layerdecomp.models.lora import LoRAConfig, merge_lora
from layerdecomp.models.mmdit import MMDiT, MMDiTConfig
from layerdecomp.tensor_files import read_metadata
from layerdecomp.weights import Adapter, load_mmdit, save_model

METADATA = (
    "format_version",
    "base_model",
    "base_sha256",
    "rank",
    "alpha",
    "targets",
    "licence",
    "date",
    "tool_version",
)


@pytest.fixture
def host(tiny_config: DecomposerConfig) -> nn.Module:
    """The frozen base as a diffusers model."""
    return build_reference_transformer(load_mmdit(tiny_config.weights.transformer))


# diffusers


def test_diffusers_loads_the_lora_with_equal_outputs(
    adapter_file: Path, adapted: MMDiT, host: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "lora.safetensors"
    written = export(adapter_file, "diffusers", out)
    assert [path.name for path in written] == ["lora.safetensors", "lora.NOTICE.txt", "lora.extras.safetensors"]
    assert output_error(diffusers_output(host), adapted) > 0.1  # the base alone differs
    diffusers_logging.enable_propagation()
    host.load_lora_adapter(load_file(out))  # type: ignore[operator]
    assert not caplog.messages  # nothing missing, nothing unexpected
    assert output_error(diffusers_output(host), adapted) < 1e-5
    stray = {"transformer.x_embedder.lora_C.weight": torch.zeros(1)}
    host.load_lora_adapter({**load_file(out), **stray}, adapter_name="stray")  # type: ignore[operator]
    assert "unexpected keys" in caplog.text  # how a bad key would have been reported


def test_the_fill_pipeline_loads_the_lora(adapter_file: Path, adapted: MMDiT, host: nn.Module, tmp_path: Path) -> None:
    export(adapter_file, "diffusers", tmp_path / "lora.safetensors")
    parts = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipeline = FluxFillPipeline(transformer=host, **parts)
    pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    assert output_error(diffusers_output(pipeline.transformer), adapted) < 1e-5


def test_diffusers_reads_kohya_files_except_the_input_projection(
    tiny_config: DecomposerConfig, host: nn.Module, tmp_path: Path
) -> None:
    """Its converter supports single_blocks.*.linear1 only at full size (see test_adapters.py), so they are left out."""
    targets = ["double_blocks.*_attn.*", "double_blocks.*_mlp.*", "single_blocks.*.linear2"]
    config = replace(tiny_config, lora=LoRAConfig(4, 6.0, targets))
    decomposer = build_decomposer(config)
    for name, parameter in decomposer.transformer.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) / 4
    decomposer.adapter(config.to_metadata()).save(tmp_path / "adapter.safetensors")
    export(tmp_path / "adapter.safetensors", "kohya", tmp_path / "lora.safetensors")
    parts = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipeline = FluxFillPipeline(transformer=host, **parts)
    assert output_error(diffusers_output(host), decomposer.transformer) > 0.03
    pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    assert output_error(diffusers_output(pipeline.transformer), decomposer.transformer) < 1e-5


# ComfyUI


def _comfy_patches(model: MMDiT, lora: dict[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
    """What ComfyUI adds to each parameter (`comfy/lora.py`: model_lora_keys_unet, load_lora), and the keys it uses."""
    patches, used = {}, set()
    for parameter in [name for name in model.state_dict() if name.endswith(".weight")]:
        key = f"lora_unet_{parameter.removesuffix('.weight').replace('.', '_')}"
        up, down = lora.get(f"{key}.lora_up.weight"), lora.get(f"{key}.lora_down.weight")
        if up is not None and down is not None:
            alpha = lora.get(f"{key}.alpha")
            patches[parameter] = (1.0 if alpha is None else alpha.item() / down.shape[0]) * (up @ down)
        if (diff := lora.get(f"{key}.diff_b")) is not None:
            patches[f"{parameter.removesuffix('.weight')}.bias"] = diff
        used |= {f"{key}.{kind}" for kind in ("lora_up.weight", "lora_down.weight", "alpha", "diff_b")}
    return patches, used


def test_comfyui_uses_every_key_with_equal_outputs(
    adapter_file: Path, adapted: MMDiT, tiny_config: DecomposerConfig, tmp_path: Path
) -> None:
    out = tmp_path / "lora.safetensors"
    export(adapter_file, "kohya", out)
    model, lora = load_mmdit(tiny_config.weights.transformer), load_file(out)
    patches, used = _comfy_patches(model, lora)
    assert not lora.keys() - used
    for name, patch in patches.items():
        model.get_parameter(name).data += patch
    assert output_error(model, adapted) < 1e-5


def _comfy_diffusers_keys(config: MMDiTConfig) -> dict[str, tuple[str, int, int]]:
    """Where ComfyUI (`comfy/utils.py`: flux_to_diffusers) puts diffusers' layers: published layer, first row, rows."""
    hidden, keys = config.hidden_size, {}
    whole = {
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        "proj_out": "final_layer.linear",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
        "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    }
    for i in range(config.depth):
        theirs, adapted = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for part, row in zip("qkv", range(3), strict=True):
            keys[f"{theirs}.attn.to_{part}"] = (f"{adapted}.img_attn.qkv", row * hidden, hidden)
            keys[f"{theirs}.attn.add_{part}_proj"] = (f"{adapted}.txt_attn.qkv", row * hidden, hidden)
        whole |= {
            f"{theirs}.attn.to_out.0": f"{adapted}.img_attn.proj",
            f"{theirs}.attn.to_add_out": f"{adapted}.txt_attn.proj",
            f"{theirs}.norm1.linear": f"{adapted}.img_mod.lin",
            f"{theirs}.norm1_context.linear": f"{adapted}.txt_mod.lin",
            f"{theirs}.ff.net.0.proj": f"{adapted}.img_mlp.0",
            f"{theirs}.ff.net.2": f"{adapted}.img_mlp.2",
            f"{theirs}.ff_context.net.0.proj": f"{adapted}.txt_mlp.0",
            f"{theirs}.ff_context.net.2": f"{adapted}.txt_mlp.2",
        }
    for i in range(config.depth_single_blocks):
        theirs, adapted = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        for part, row in zip("qkv", range(3), strict=True):
            keys[f"{theirs}.attn.to_{part}"] = (f"{adapted}.linear1", row * hidden, hidden)
        keys[f"{theirs}.proj_mlp"] = (f"{adapted}.linear1", 3 * hidden, 4 * hidden)
        whole |= {f"{theirs}.norm.linear": f"{adapted}.modulation.lin", f"{theirs}.proj_out": f"{adapted}.linear2"}
    return keys | {theirs: (adapted, 0, -1) for theirs, adapted in whole.items()}


def test_comfyui_ignores_only_the_biases_of_diffusers_files(
    adapter_file: Path, adapted: MMDiT, tiny_config: DecomposerConfig, tmp_path: Path
) -> None:
    export(adapter_file, "diffusers", tmp_path / "lora.safetensors")
    model, lora = load_mmdit(tiny_config.weights.transformer), load_file(tmp_path / "lora.safetensors")
    for theirs, (layer, row, rows) in _comfy_diffusers_keys(model.config).items():
        down, up = (lora.pop(f"transformer.{theirs}.lora_{kind}.weight", None) for kind in "AB")
        if up is not None and down is not None:
            patch = up @ down  # no alpha: a scale of 1
            if layer == "final_layer.adaLN_modulation.1":
                patch = torch.cat(patch.chunk(2)[::-1])
            weight = model.get_parameter(f"{layer}.weight").data
            weight[row : row + rows if rows > 0 else None] += patch
    assert lora and all(name.endswith(".lora_B.bias") for name in lora)
    assert {name for name, bias in lora.items() if bias.any()} == {"transformer.x_embedder.lora_B.bias"}
    model.img_in.bias.data += lora["transformer.x_embedder.lora_B.bias"]  # the only bias that ComfyUI loses
    assert output_error(model, adapted) < 1e-5


# merged


def test_merged_weights_give_the_outputs_of_the_adapted_model(
    adapter_file: Path, adapted: MMDiT, tiny_config: DecomposerConfig, tmp_path: Path
) -> None:
    base = load_mmdit(tiny_config.weights.transformer)
    for dtype, error in (("float32", 1e-5), ("bfloat16", 0.03), ("fp8", 0.15)):
        out = tmp_path / f"{dtype}.safetensors"
        written = export(adapter_file, "merged", out, dtype=dtype)
        assert [path.name for path in written] == [
            f"{dtype}{end}" for end in (".safetensors", ".NOTICE.txt", ".extras.safetensors")
        ]
        merged = load_mmdit(out)
        assert merged.state_dict().keys() == base.state_dict().keys() and merged.config == base.config
        assert output_error(merged, adapted) < error < 0.5 * output_error(base, adapted)
        assert read_metadata(out)["merged"] == "yes" and read_metadata(out)["format_version"] == "1"
    sizes = [(tmp_path / f"{dtype}.safetensors").stat().st_size for dtype in ("float32", "bfloat16", "fp8")]
    assert sizes[0] > 1.8 * sizes[1] and sizes[1] > 1.4 * sizes[2]

    folded = merge_lora(adapted)
    merged = load_mmdit(tmp_path / "bfloat16.safetensors")
    for name, tensor in folded.state_dict().items():
        assert merged.state_dict()[name].equal(tensor.bfloat16().float()), name
    fusion = Adapter.load(adapter_file).tensors
    extras = load_file(tmp_path / "fp8.extras.safetensors")
    assert extras.keys() == {name for name in fusion if name.startswith("context_fusion.")}
    assert all(extras[name].equal(fusion[name]) for name in extras)


def test_fp8_files_are_laid_out_as_comfyui_expects(adapter_file: Path, tmp_path: Path) -> None:
    export(adapter_file, "merged", tmp_path / "fp8.safetensors", dtype="fp8")
    tensors = load_file(tmp_path / "fp8.safetensors")
    scales = {name for name in tensors if name.endswith(".scale_weight")}
    small = {name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn}
    assert small - {"scaled_fp8"} == {name.replace(".scale_weight", ".weight") for name in scales}
    assert tensors["scaled_fp8"].shape == (2,)  # two elements: do not multiply in fp8
    assert all(tensors[name].dtype == torch.float32 and tensors[name].shape == () for name in scales)
    assert all(tensors[name].float().abs().max() == 448 for name in small - {"scaled_fp8"})  # the whole range is used
    assert "single_blocks.0.linear1.weight" in small and "img_in.weight" not in small


def test_merging_does_not_hold_the_model_in_memory(tiny_config: DecomposerConfig, tmp_path: Path) -> None:
    """In a separate process: a file of 184 MB, whose largest tensor is 7 MB."""
    base = tmp_path / "base.safetensors"
    size = MMDiTConfig(hidden_size=512, num_heads=8, axes_dim=[16, 24, 24], depth=3, depth_single_blocks=4)
    save_model(base, MMDiT(size), {})
    weights = replace(tiny_config.weights, transformer=str(base))
    config = DecomposerConfig(weights, LoRAConfig(rank=2), ContextFusionConfig(enabled=False))
    build_decomposer(config).adapter(config.to_metadata()).save(tmp_path / "adapter.safetensors")
    (tmp_path / "merge.py").write_text(
        """
import sys
from pathlib import Path
from layerdecomp.export import export

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

before = peak()
export(sys.argv[1], "merged", sys.argv[2], dtype="float32")
print(peak() - before)
"""
    )
    out = tmp_path / "merged.safetensors"
    command = [sys.executable, str(tmp_path / "merge.py"), str(tmp_path / "adapter.safetensors"), str(out)]
    memory = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert memory < 90 < out.stat().st_size / 2**20 / 1.8


def test_a_layer_that_is_trained_in_full_is_merged_and_kept_by_other_formats(
    tiny_config: DecomposerConfig, tmp_path: Path
) -> None:
    decomposer, path = build_decomposer(tiny_config), tmp_path / "adapter.safetensors"
    last = decomposer.transformer.final_layer.linear.requires_grad_(True)
    fill(last, seed=1)
    decomposer.adapter(tiny_config.to_metadata()).save(path)
    export(path, "merged", tmp_path / "merged.safetensors", dtype="float32")
    assert load_mmdit(tmp_path / "merged.safetensors").final_layer.linear.weight.equal(last.weight)
    assert not any("final_layer" in name for name in load_file(tmp_path / "merged.extras.safetensors"))
    export(path, "kohya", tmp_path / "lora.safetensors")
    export(tmp_path / "lora.safetensors", "import", tmp_path / "back.safetensors")
    assert load_file(tmp_path / "back.safetensors")["final_layer.linear.weight"].equal(last.weight)


def test_without_fusion_no_extras_are_written(tiny_config: DecomposerConfig, tmp_path: Path) -> None:
    config = replace(tiny_config, fusion=ContextFusionConfig(enabled=False))
    decomposer = build_decomposer(config)
    fill(decomposer.transformer.img_in, seed=1)
    decomposer.adapter(config.to_metadata()).save(tmp_path / "adapter.safetensors")
    out = tmp_path / "merged.safetensors"
    assert export(tmp_path / "adapter.safetensors", "merged", out) == [out, tmp_path / "merged.NOTICE.txt"]
    assert load_mmdit(out).img_in.weight.equal(decomposer.transformer.img_in.weight.bfloat16().float())


# published folders


def test_a_published_folder_is_self_contained(
    adapter_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "published"
    written = export(adapter_file, "decomposer", out, with_base=True)
    names = {path.name for path in written}
    parts = {f"{part}.safetensors" for part in ("adapter", "transformer", "autoencoder", "rgba_autoencoder")}
    assert names == parts | {"README.md", "NOTICE", "LICENSE", "config.yaml"}
    expected = Decomposer.from_pretrained(adapter_file)
    (moved := tmp_path / "elsewhere").mkdir()
    out.rename(moved / "downloaded")
    monkeypatch.chdir(moved)
    for path in ("downloaded", "downloaded/adapter.safetensors"):
        decomposer = Decomposer.from_pretrained(path)
        assert same(dict(decomposer.named_parameters()), dict(expected.named_parameters()))
    card = (moved / "downloaded" / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n") and "| background/psnr | 20.5 \u00b1 0.25 |" in card
    assert read_metadata(adapter_file)["base_sha256"] in card and "2026-01-02" in card and '"source": "scenes"' in card
    assert "modified" in (moved / "downloaded" / "NOTICE").read_text()


def test_the_base_is_published_only_on_request(adapter_file: Path, tmp_path: Path) -> None:
    names = {path.name for path in export(adapter_file, "decomposer", tmp_path / "published")}
    assert "rgba_autoencoder.safetensors" in names and "transformer.safetensors" not in names
    weights = json.loads(read_metadata(tmp_path / "published" / "adapter.safetensors")["weights"])
    assert weights["rgba_autoencoder"] == "rgba_autoencoder.safetensors"
    assert weights["transformer"] == json.loads(read_metadata(adapter_file)["weights"])["transformer"]
    assert Decomposer.from_pretrained(tmp_path / "published").context_fusion is not None


def test_a_published_folder_includes_the_prompt(tiny_config: DecomposerConfig, tmp_path: Path) -> None:
    prompt = {"txt": torch.randn(3, 8), "vec": torch.randn(8)}
    save_file(prompt, tmp_path / "empty.safetensors")
    config = replace(tiny_config, weights=replace(tiny_config.weights, prompt=str(tmp_path / "empty.safetensors")))
    build_decomposer(config).adapter(config.to_metadata()).save(tmp_path / "adapter.safetensors")
    export(tmp_path / "adapter.safetensors", "decomposer", tmp_path / "published")
    (tmp_path / "empty.safetensors").unlink()
    loaded = Decomposer.from_pretrained(tmp_path / "published").prompt
    assert loaded.txt.equal(prompt["txt"]) and loaded.vec.equal(prompt["vec"])


def test_a_folder_is_written_completely_or_not_at_all(
    adapter_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "a").write_text("mine")
    with pytest.raises(InputError, match="taken exists and is not empty"):
        export(adapter_file, "decomposer", tmp_path / "taken")

    def full_disk(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full_disk)
    with pytest.raises(InputError, match="new could not be written .*No space left"):
        export(adapter_file, "decomposer", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_an_adapter_of_flux_is_published_with_its_licence(
    adapter_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerdecomp.export._is_flux", lambda model: True)
    with pytest.raises(InputError, match=r"LICENSE.md does not exist; .* published with its licence"):
        export(adapter_file, "decomposer", tmp_path / "published")
    base = tmp_path / "base" / "transformer.safetensors"
    base.parent.mkdir()
    source = json.loads(read_metadata(adapter_file)["weights"])["transformer"]
    base.write_bytes(Path(source).read_bytes())
    (base.parent / "LICENSE.md").write_text("the licence")
    export(adapter_file, "decomposer", tmp_path / "published", transformer=str(base))
    assert (tmp_path / "published" / "LICENSE.md").read_text() == "the licence"
    assert "license_name: flux-1-dev-non-commercial-license" in (tmp_path / "published" / "README.md").read_text()
    notice = (tmp_path / "published" / "NOTICE").read_text()
    assert modelcard.FLUX in notice and "modified: LoRA and input projection added" in notice
    assert read_metadata(adapter_file)["base_sha256"] in notice


# All formats


@pytest.mark.parametrize("format", FORMATS)
def test_exports_carry_metadata_and_are_reproducible(
    adapter_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    first = export(adapter_file, format, tmp_path / "a")
    second = export(adapter_file, format, tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    for path in (path for path in first if path.name in ("a", "a.extras.safetensors", "adapter.safetensors")):
        metadata = read_metadata(path)
        assert all(metadata.get(key) for key in (*METADATA, "data")), path
        assert metadata["date"] == "2026-01-02T03:04:05+00:00" and metadata["modified"].startswith("yes: ")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    path = export(adapter_file, format, tmp_path / "c")[0]
    path = path if path.is_file() and path.name == "c" else tmp_path / "c" / "adapter.safetensors"
    assert read_metadata(path)["date"] == "1970-01-01T00:00:00+00:00"


def test_the_adapter_format_saves_bf16(tiny_weights: Path, tmp_path: Path) -> None:
    source, out = tiny_weights / "adapter.safetensors", tmp_path / "new" / "adapter.safetensors"
    assert export(source, "adapter", out) == [out]
    before, after = Adapter.load(source), Adapter.load(out)
    assert (before.metadata["rank"], before.metadata["alpha"]) == ("2", "3.0")
    assert (
        after.metadata == {"data": "unknown", **before.metadata, "date": "unknown"}
        and after.tensors.keys() == before.tensors.keys()
    )
    assert all(after.tensors[name].equal(tensor.bfloat16()) for name, tensor in before.tensors.items())
    assert out.stat().st_size < 0.7 * source.stat().st_size
    loaded = Decomposer.from_pretrained(out)
    assert loaded.transformer.img_in.weight.dtype == torch.float32
    export(source, "kohya", tmp_path / "kohya.safetensors", dtype="bfloat16")
    for name, tensor in load_file(tmp_path / "kohya.safetensors").items():  # a rounded alpha would change the scale
        assert tensor.dtype == (torch.float32 if name.endswith(".alpha") else torch.bfloat16)


@pytest.mark.parametrize("format", ["adapter", "merged", "diffusers"])
def test_an_export_may_overwrite_its_source(tiny_weights: Path, tmp_path: Path, format: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes((tiny_weights / "adapter.safetensors").read_bytes())
    assert path in export(path, format, path)
    assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values())


@pytest.mark.parametrize(
    ("source", "format", "message"),
    [
        ("adapter", "kohya2", "format=kohya2: expected one of adapter, import, diffusers, kohya, merged, decomposer"),
        ("absent", "adapter", "absent.safetensors does not exist"),
        ("autoencoder", "merged", "autoencoder.safetensors is not an adapter"),
    ],
)
def test_invalid_exports_are_rejected(
    tiny_weights: Path, tmp_path: Path, source: str, format: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        export(tiny_weights / f"{source}.safetensors", format, tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())
