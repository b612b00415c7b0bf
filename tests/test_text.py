"""Prompt embeddings against FluxFillPipeline.encode_prompt, with small random text encoders."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import fill
from diffusers import FluxFillPipeline
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from layerdecomp.decomposer import build_decomposer
from layerdecomp.errors import InputError
from layerdecomp.inpainting import Prompt
from layerdecomp.manifest import DecomposerConfig
from layerdecomp.tensor_files import file_sha256, read_metadata
from layerdecomp.text import embed_prompt, save_prompt
from layerdecomp.weights import load_mmdit

LETTERS = [chr(letter) for letter in range(ord("a"), ord("z") + 1)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the layout of the published repository, and encoders of width 8 whose vocabulary is the letters."""
    root = tmp_path_factory.mktemp("flux")
    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    CLIPTokenizer({word: i for i, word in enumerate(words)}, [], model_max_length=77).save_pretrained(
        root / "tokenizer"
    )
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((letter, -3.0) for letter in LETTERS)]
    T5TokenizerFast(pieces, extra_ids=0, model_max_length=512).save_pretrained(root / "tokenizer_2")
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words), hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(pieces), d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip
    for seed, (name, model) in enumerate((("text_encoder", clip), ("text_encoder_2", t5))):
        fill(model, seed)
        model.save_pretrained(root / name)
    return root


def _pipeline(root: Path) -> FluxFillPipeline:
    return FluxFillPipeline(
        scheduler=None,
        vae=None,
        transformer=None,
        text_encoder=CLIPTextModel.from_pretrained(root / "text_encoder").eval(),
        tokenizer=CLIPTokenizer.from_pretrained(root / "tokenizer"),
        text_encoder_2=T5EncoderModel.from_pretrained(root / "text_encoder_2").eval(),
        tokenizer_2=T5TokenizerFast.from_pretrained(root / "tokenizer_2"),
    )


@pytest.mark.parametrize(("prompt", "tokens"), [("", 512), ("a cup on a table", 512), ("a long story", 5)])
def test_embeddings_equal_those_of_the_pipeline(root: Path, prompt: str, tokens: int) -> None:
    with torch.no_grad():
        txt, vec, _ = _pipeline(root).encode_prompt(prompt, None, max_sequence_length=tokens)
    found = embed_prompt(root, prompt, tokens, torch.float32)
    assert found["txt"].shape == (tokens, 8) and found["vec"].shape == (8,)
    assert torch.equal(found["txt"], txt[0]) and torch.equal(found["vec"], vec[0])
    other = embed_prompt(root, prompt + "x", 512, torch.float32)
    assert not torch.allclose(other["txt"][:5], found["txt"][:5]) and not torch.allclose(other["vec"], found["vec"])


def test_a_saved_prompt_is_loaded_by_the_model(root: Path, tiny_config: DecomposerConfig, tmp_path: Path) -> None:
    path, found = tmp_path / "prompt.safetensors", embed_prompt(root, "a cup", 7)
    save_prompt(path, found, "a cup", root)
    metadata = read_metadata(path)
    assert metadata["prompt"] == "a cup" and metadata["text_encoder_2_sha256"] == file_sha256(root / "text_encoder_2")
    prompt = Prompt.load(str(path), load_mmdit(tiny_config.weights.transformer))
    assert prompt.txt.equal(found["txt"]) and prompt.vec.equal(found["vec"])
    config = replace(tiny_config, weights=replace(tiny_config.weights, prompt=str(path)))
    decomposer = build_decomposer(config)
    assert decomposer.prompt.inputs(2, torch.float32)["txt"].shape == (2, 7, 8)


def test_missing_folders_and_libraries_are_named(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="has no folder text_encoder, text_encoder_2, tokenizer, tokenizer_2"):
        embed_prompt(tmp_path)
    for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        (tmp_path / name).mkdir()
    with pytest.raises(InputError, match="text_encoder or tokenizer cannot be read"):
        embed_prompt(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"embedding a prompt needs the extra text .*\[text\]"):
        embed_prompt(root)


def test_fill_randomises_every_parameter(root: Path) -> None:
    """The comparison above would prove little with freshly initialised encoders."""
    model: nn.Module = T5EncoderModel.from_pretrained(root / "text_encoder_2")
    assert all(parameter.std() > 0.01 for parameter in model.parameters())
