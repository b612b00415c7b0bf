"""Weight files: round trips, strict loading, other formats, and damaged or unsuitable files."""

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import RGB, RGBA, TRANSFORMER, fill, same
from reference import build_reference_autoencoder, build_reference_transformer
from safetensors.torch import load_file, save_file
from torch import Tensor

from layerdecomp.decomposer import Decomposer, build_decomposer
from layerdecomp.errors import InputError
from layerdecomp.layouts import diffusers_transformer, published
from layerdecomp.manifest import DecomposerConfig, open_adapter
from layerdecomp.models.autoencoder import Autoencoder, AutoencoderConfig
from layerdecomp.models.mmdit import MMDiT, MMDiTConfig
from layerdecomp.tensor_files import TensorFile, file_sha256, read_metadata
from layerdecomp.weights import (
    Adapter,
    checksums,
    config_from,
    find_weights,
    load_autoencoder,
    load_mmdit,
    open_state,
    save_model,
)


@pytest.mark.parametrize(
    "model", [MMDiT(TRANSFORMER), Autoencoder(RGB), Autoencoder(RGBA)], ids=["mmdit", "rgb", "rgba"]
)
def test_models_survive_a_round_trip(tmp_path: Path, model: MMDiT | Autoencoder) -> None:
    fill(model, seed=7)
    path, load = tmp_path / "new" / "a.safetensors", load_mmdit if isinstance(model, MMDiT) else load_autoencoder
    save_model(path, model, {"steps": "5"}, dtype=torch.float32)
    loaded = load(path)
    assert loaded.config == model.config and not loaded.training
    assert same(loaded.state_dict(), model.state_dict())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert read_metadata(path)["steps"] == "5"

    save_model(path, model, {})
    rounded = {name: tensor.bfloat16().float() for name, tensor in model.state_dict().items()}
    assert same(load(path).state_dict(), rounded)
    assert {tensor.dtype for tensor in load(path, dtype=torch.bfloat16).state_dict().values()} == {torch.bfloat16}


def test_a_given_config_overrides_that_of_the_file(tmp_path: Path) -> None:
    path, model = tmp_path / "a.safetensors", MMDiT(TRANSFORMER)
    save_file(model.state_dict(), path)  # as published: no metadata
    assert same(load_mmdit(path, TRANSFORMER).state_dict(), model.state_dict())
    assert load_mmdit(path, replace(TRANSFORMER, theta=100)).config.theta == 100


def test_a_file_without_metadata_is_loaded_as_the_published_model(tmp_path: Path) -> None:
    path = tmp_path / "flux1-fill-dev.safetensors"
    save_file(MMDiT(TRANSFORMER).state_dict(), path)
    with pytest.raises(InputError, match=r"does not fit this MMDiT: 48 tensors found, 780 expected") as error:
        load_mmdit(path)
    assert "img_in.weight [32, 384] for [3072, 384]" in str(error.value)


def test_one_error_lists_every_misfit(tmp_path: Path) -> None:
    path, state = tmp_path / "a.safetensors", Autoencoder(RGB).state_dict()
    state["encoder.conv_in.bias"] = torch.zeros(9)
    state["surplus"] = state.pop("decoder.conv_out.bias")
    del state["encoder.conv_out.bias"]
    save_file(state, path)
    with pytest.raises(InputError) as error:
        load_autoencoder(path, RGB)
    assert str(error.value).splitlines() == [
        f"{path} does not fit this Autoencoder: {len(state)} tensors found, {len(state) + 1} expected",
        "  2 missing: encoder.conv_out.bias, decoder.conv_out.bias",
        "  1 unexpected: surplus",
        "  1 of another shape: encoder.conv_in.bias [9] for [8]",
    ]


def test_rgb_weights_are_not_loaded_as_rgba_weights(tiny_weights: Path) -> None:
    with pytest.raises(InputError, match=r"encoder.conv_in.weight \[8, 3, 3, 3\] for \[8, 4, 3, 3\]"):
        load_autoencoder(tiny_weights / "autoencoder.safetensors", RGBA)


# diffusers folders


@pytest.fixture
def diffusers_folder(tmp_path: Path) -> tuple[Path, MMDiT, Autoencoder]:
    """A pipeline folder written by diffusers, with a sharded transformer, and the models whose weights it has."""
    mmdit, autoencoder = MMDiT(replace(TRANSFORMER, guidance_embed=True, depth=2)), Autoencoder(RGB)
    fill(mmdit, seed=1)
    fill(autoencoder, seed=2)
    build_reference_transformer(mmdit).save_pretrained(tmp_path / "transformer", max_shard_size="100KB")
    build_reference_autoencoder(autoencoder).save_pretrained(tmp_path / "vae")
    assert len(list((tmp_path / "transformer").glob("*-of-*.safetensors"))) > 2
    return tmp_path, mmdit, autoencoder


def test_diffusers_folders_are_read(diffusers_folder: tuple[Path, MMDiT, Autoencoder]) -> None:
    folder, mmdit, autoencoder = diffusers_folder
    loaded = load_mmdit(folder / "transformer")
    assert loaded.config == mmdit.config and same(loaded.state_dict(), mmdit.state_dict())
    half = load_mmdit(folder / "transformer", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    with pytest.raises(InputError, match="holds 0 .safetensors files .* such as transformer/ or vae/"):
        load_mmdit(folder)
    for path in (folder / "vae", folder / "vae" / "diffusion_pytorch_model.safetensors"):
        read = load_autoencoder(path, None if path.is_dir() else RGB)
        assert read.config == RGB and same(read.state_dict(), autoencoder.state_dict())


def test_an_adapter_loads_its_base_from_a_diffusers_folder(
    diffusers_folder: tuple[Path, MMDiT, Autoencoder], tiny_config: DecomposerConfig
) -> None:
    folder, mmdit, _ = diffusers_folder
    config = replace(tiny_config, weights=replace(tiny_config.weights, transformer=str(folder / "transformer")))
    decomposer = build_decomposer(config)
    decomposer.adapter(config.to_metadata()).save(folder / "adapter.safetensors")
    loaded = Decomposer.from_pretrained(folder / "adapter.safetensors")
    assert loaded.transformer.img_in.weight.equal(mmdit.img_in.weight)
    sums = "".join(f"{file_sha256(file)}\n" for file in sorted((folder / "transformer").glob("*.safetensors")))
    assert read_metadata(folder / "adapter.safetensors")["base_sha256"] == hashlib.sha256(sums.encode()).hexdigest()
    file_sha256.cache_clear()
    shard = min((folder / "transformer").glob("*.safetensors"))
    save_file({name: tensor + 1 for name, tensor in load_file(shard).items()}, shard)
    with pytest.raises(InputError, match="transformer is not the transformer that"):
        Decomposer.from_pretrained(folder / "adapter.safetensors")


def test_folders_of_other_flux_models_are_refused(tiny_config: DecomposerConfig, tmp_path: Path) -> None:
    build_reference_transformer(MMDiT(replace(TRANSFORMER, in_channels=64))).save_pretrained(tmp_path)
    weights = replace(tiny_config.weights, transformer=str(tmp_path))
    with pytest.raises(InputError, match="takes 64 input channels; this is FLUX.1-dev .* not Fill; expected 384"):
        build_decomposer(replace(tiny_config, weights=weights))


def test_incomplete_or_inconsistent_folders_are_refused(diffusers_folder: tuple[Path, MMDiT, Autoencoder]) -> None:
    folder = diffusers_folder[0] / "transformer"
    shard = max(folder.glob("*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(InputError, match=f"{shard.name}: truncated"):
        load_mmdit(folder)
    shard.unlink()
    with pytest.raises(InputError, match=f"index.json lists {shard.name}, not in the folder"):
        load_mmdit(folder)
    shard.write_bytes(content)
    description = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**description, "num_layers": 1}))
    with pytest.raises(InputError, match=r"unexpected: transformer_blocks.1.attn") as error:
        load_mmdit(folder)
    assert str(error.value).count("transformer_blocks.1") == 10  # the first ten names, and the number of all
    names = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())["weight_map"]
    surplus = sum(name.startswith("transformer_blocks.1.") for name in names)
    assert f"  {surplus} unexpected: transformer_blocks.1." in str(error.value) and surplus > 10
    for text in ("{", "[1]", "7", '{"num_layers": 1}'):
        (folder / "config.json").write_text(text)
        with pytest.raises(InputError, match="config.json"):
            load_mmdit(folder)


def test_fp8_files_are_read_with_their_scales(tmp_path: Path) -> None:
    model = MMDiT(TRANSFORMER)
    fill(model, seed=1)
    state, path = model.state_dict(), tmp_path / "fp8.safetensors"
    matrices = [name for name, tensor in state.items() if tensor.dim() == 2]
    scales = {name: tensor.abs().max() / 448 for name, tensor in state.items() if name in matrices}
    small = {name: (state[name] / scales[name]).to(torch.float8_e4m3fn) for name in matrices}
    expected = {**state, **{name: small[name].float() * scales[name] for name in matrices}}

    stored = {name.replace(".weight", ".scale_weight"): scale for name, scale in scales.items()}
    save_file({**state, **small, **stored, "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}, path)
    assert same(load_mmdit(path, TRANSFORMER).state_dict(), expected)

    rows = {name: torch.full((len(state[name]), 1), float(scales[name])) for name in matrices}  # one scale per row
    rows["img_in.weight"][0] *= 2
    expected["img_in.weight"] = expected["img_in.weight"].clone()
    expected["img_in.weight"][0] *= 2
    stored = {name.replace(".weight", ".weight_scale"): scale for name, scale in rows.items()}
    save_file({**state, **small, **stored}, path)
    assert same(load_mmdit(path, TRANSFORMER).state_dict(), expected)

    plain = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in state.items()}
    save_file(plain, path)
    loaded = load_mmdit(path, TRANSFORMER, dtype=torch.bfloat16).state_dict()
    assert same(loaded, {name: tensor.bfloat16() for name, tensor in plain.items()})
    save_file({**plain, "img_in.odd_scale": torch.ones(1)}, path)
    with pytest.raises(
        InputError, match=r"fp8.safetensors \(in fp8\) does not fit .*\n.* unexpected: img_in.odd_scale"
    ):
        load_mmdit(path, TRANSFORMER)


def test_blockwise_scales_are_refused(tmp_path: Path) -> None:
    model, path = MMDiT(TRANSFORMER), tmp_path / "fp8.safetensors"
    scales = torch.ones(len(model.txt_in.weight), 2)
    save_file({**model.to(torch.float8_e4m3fn).state_dict(), "txt_in.weight_scale": scales}, path)
    with pytest.raises(InputError, match=r"fp8.safetensors: txt_in.weight_scale has 64 numbers; expected one, or one"):
        load_mmdit(path, TRANSFORMER)


def test_tensors_are_read_in_the_order_of_their_files(
    diffusers_folder: tuple[Path, MMDiT, Autoencoder], tmp_path: Path
) -> None:
    folder, mmdit, _ = diffusers_folder
    save_model(tmp_path / "a.safetensors", mmdit, {})
    for path, layout in (
        (tmp_path / "a.safetensors", published),
        (folder / "transformer", diffusers_transformer(TRANSFORMER.hidden_size)),
    ):
        file, names = TensorFile(path), list(open_state(mmdit, path, layout=layout))
        assert names != list(mmdit.state_dict()) and set(names) == mmdit.state_dict().keys()
        first = [file.places[next(iter(layout(name, (96, 1)).shapes))] for name in names]
        assert all((a.path, a.start) < (b.path, b.start) for a, b in pairwise(first))


def test_loading_needs_little_memory_besides_the_model(tmp_path: Path) -> None:
    """In a separate process: 192 MB in bf16 become 384 MB in float32; at most one tensor (8 MB) exists twice."""
    code = f"""
import torch
from pathlib import Path
from safetensors.torch import save_file
from layerdecomp.weights import load_state

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

class Many(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = torch.nn.ParameterList(torch.empty(2048, 2048) for _ in range(24))

path = {str(tmp_path / "a.safetensors")!r}
if __name__ == "__main__":
    import sys
    if sys.argv[1] == "write":
        save_file({{f"parts.{{i}}": torch.full((2048, 2048), i, dtype=torch.bfloat16) for i in range(24)}}, path)
    else:
        with torch.device("meta"):
            model = Many()
        before = peak()
        load_state(model, path)
        print(peak() - before)
        assert model.parts[23].eq(23).all()
"""
    (tmp_path / "load.py").write_text(code)
    command = [sys.executable, str(tmp_path / "load.py")]
    subprocess.run([*command, "write"], check=True)
    peak = int(subprocess.run([*command, "read"], check=True, capture_output=True, text=True).stdout) / 1024  # MiB
    assert 384 <= peak < 384 + 48


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"hidden": 1}', '{"depth": "many"}', '{"num_heads": 5}', '{"depth": "${x}"}']
)
def test_metadata_that_describe_no_model_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="^a.safetensors: its metadata [^\n]* MMDiTConfig[^\n]*$"):
        config_from(MMDiTConfig, text, "a.safetensors")


def test_checksums_of_a_missing_file_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="absent.safetensors does not exist; put the file there"):
        checksums(tmp_path / "absent.safetensors")


def test_configs_come_from_metadata() -> None:
    assert config_from(AutoencoderConfig, json.dumps(asdict(RGB)), "a") == RGB
    assert config_from(AutoencoderConfig, None, "a") == AutoencoderConfig()


def test_an_adapter_survives_a_round_trip(tiny_weights: Path, tiny_decomposer: Decomposer, tmp_path: Path) -> None:
    adapter = Adapter.load(tiny_weights / "adapter.safetensors")
    adapter.save(tmp_path / "copy.safetensors")
    copy = Adapter.load(tmp_path / "copy.safetensors")
    assert same(copy.tensors, adapter.tensors) and copy.metadata == adapter.metadata
    kinds = {name.split(".")[0] for name in adapter.tensors}
    assert kinds == {"img_in", "double_blocks", "single_blocks", "context_fusion"}
    assert all("lora_" in name for name in adapter.tensors if "blocks" in name and "context_fusion" not in name)
    assert tiny_decomposer.transformer.img_in.weight.equal(adapter.tensors["img_in.weight"])
    assert adapter.metadata["base_sha256"] == file_sha256(tiny_weights / "transformer.safetensors")
    assert json.loads(adapter.metadata["lora"])["rank"] == 2


def test_adapters_of_another_format_and_other_files_are_refused(tiny_weights: Path, tmp_path: Path) -> None:
    adapter, path = Adapter.load(tiny_weights / "adapter.safetensors"), tmp_path / "a.safetensors"
    Adapter(adapter.tensors, {**adapter.metadata, "format_version": "99"}).save(path)
    with pytest.raises(InputError, match="adapter format 99, expected 1; update layerdecomp"):
        Adapter.load(path)
    with pytest.raises(InputError, match="transformer.safetensors is not an adapter"):
        Adapter.load(tiny_weights / "transformer.safetensors")


def test_adapters_that_do_not_fit_are_refused(tiny_weights: Path, tmp_path: Path) -> None:
    adapter, path = Adapter.load(tiny_weights / "adapter.safetensors"), tmp_path / "a.safetensors"
    tensors = dict(adapter.tensors)
    del tensors["img_in.bias"]
    tensors["single_blocks.0.linear2.lora_A.weight"] = torch.zeros(3, 160)
    Adapter(tensors, adapter.metadata).save(path)
    with pytest.raises(InputError, match="does not fit this decomposer, whose code or settings are not") as error:
        Decomposer.from_pretrained(path)
    assert "1 missing: img_in.bias" in str(error.value)
    assert "single_blocks.0.linear2.lora_A.weight [3, 160] for [2, 160]" in str(error.value)
    assert "this is a LoRA" not in str(error.value)  # it is meant to be one


def test_another_base_is_refused(tiny_weights: Path, tmp_path: Path) -> None:
    other = MMDiT(TRANSFORMER)
    save_model(tmp_path / "other.safetensors", other, {})
    with pytest.raises(InputError, match=r"other.safetensors is not the transformer that .*sha256 .*expected") as error:
        open_adapter(tiny_weights / "adapter.safetensors", transformer=str(tmp_path / "other.safetensors"))
    assert "transformer=" in str(error.value)


def test_frozen_parts_are_found_in_the_folder_of_the_adapter(tiny_weights: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_weights, tmp_path, dirs_exist_ok=True)
    adapter = Adapter.load(tiny_weights / "adapter.safetensors")
    files = {name: Path(path).name for name, path in json.loads(adapter.metadata["weights"]).items() if path}
    elsewhere = {name: f"gone/{file}" for name, file in files.items()}
    path = tmp_path / "adapter.safetensors"
    Adapter(adapter.tensors, {**adapter.metadata, "weights": json.dumps(elsewhere)}).save(path)
    _, config = open_adapter(path)
    assert {Path(getattr(config.weights, name)) for name in files} == {tmp_path / file for file in files.values()}
    (tmp_path / "autoencoder.safetensors").unlink()
    with pytest.raises(InputError, match="gone/autoencoder.safetensors does not exist .*checkpoints/README.md"):
        Decomposer.from_pretrained(path)


def test_find_weights_searches_the_given_folders(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("a", "deep/b"):
        (tmp_path / name).write_text("")
    assert find_weights("elsewhere/a", [tmp_path]) == tmp_path / "a"
    assert find_weights("deep/b", [tmp_path]) == tmp_path / "deep/b"
    assert find_weights(str(tmp_path / "a"), []) == tmp_path / "a"
    with pytest.raises(InputError, match=f"tried c, {tmp_path}/c, {tmp_path}/deep/c\\)"):
        find_weights("c", [tmp_path, tmp_path / "deep"])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps")
def test_mapped_weights_share_pages_with_their_file_and_writes_do_not_reach_it(tmp_path: Path) -> None:
    path = tmp_path / "transformer.safetensors"
    model = MMDiT(TRANSFORMER)
    fill(model, 0)
    save_file({name: tensor.bfloat16() for name, tensor in model.state_dict().items()}, path)
    before = path.read_bytes()
    read, mapped = (load_mmdit(path, TRANSFORMER, torch.bfloat16, mapped=mapped) for mapped in (False, True))
    assert same(read.state_dict(), mapped.state_dict())
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    pages = [range(*(int(end, 16) for end in line.split()[0].split("-"))) for line in lines]

    def in_file(tensor: Tensor) -> bool:
        return any(tensor.data_ptr() in some for some in pages)

    assert all(in_file(p) for p in mapped.parameters()) and not any(in_file(p) for p in read.parameters())
    with torch.no_grad():
        mapped.img_in.weight.zero_()
    assert path.read_bytes() == before
