"""The embedding of one prompt by FLUX's text encoders, computed once so that training and sampling need not load them.

This is the only file that needs the `text` extra (transformers).
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerdecomp.errors import InputError, needs_extra
from layerdecomp.tensor_files import Metadata, file_sha256, save_tensors
from layerdecomp.weights import TOOL_VERSION

CLIP_TOKENS = 77
ENCODERS = {"text_encoder": "CLIPTextModel", "text_encoder_2": "T5EncoderModel"}
TOKENIZERS = {"tokenizer": "CLIPTokenizer", "tokenizer_2": "T5TokenizerFast"}


@torch.no_grad()
def embed_prompt(
    root: Path, prompt: str = "", tokens: int = 512, dtype: torch.dtype = torch.bfloat16, device: str = "cpu"
) -> dict[str, Tensor]:
    """The text inputs of the transformer for a prompt, as in FLUX's pipelines: padded, without an attention mask.

    Args:
        root: folder of the published repository, with text_encoder/ and tokenizer/ (CLIP), text_encoder_2/ and
            tokenizer_2/ (T5).
        tokens: length to which T5's tokens are padded or truncated.
        dtype: of the encoders' computation.

    Returns:
        txt (tokens, 4096), T5's last hidden state, and vec (768), CLIP's pooled output, both float32.

    Raises:
        InputError: a folder is missing or cannot be read, or the `text` extra is not installed.
    """
    _check_folders(root)
    vec = _encode(root, "text_encoder", "tokenizer", prompt, CLIP_TOKENS, dtype, device).pooler_output
    txt = _encode(root, "text_encoder_2", "tokenizer_2", prompt, tokens, dtype, device).last_hidden_state
    return {"txt": txt[0].float().cpu(), "vec": vec[0].float().cpu()}


def _check_folders(root: Path) -> None:
    if missing := [name for name in (*ENCODERS, *TOKENIZERS) if not (root / name).is_dir()]:
        raise InputError(
            f"{root} has no folder {', '.join(missing)}; expected those of the published repository: put "
            "text_encoder/, text_encoder_2/, tokenizer/ and tokenizer_2/ there, or name their folder with root="
        )


def _encode(root: Path, encoder: str, tokenizer: str, prompt: str, tokens: int, dtype: torch.dtype, device: str) -> Any:
    """The output of one text encoder, which is loaded for this call only."""
    with needs_extra("embedding a prompt", "text"):
        import transformers
    try:
        words = getattr(transformers, TOKENIZERS[tokenizer]).from_pretrained(root / tokenizer, local_files_only=True)
        model = getattr(transformers, ENCODERS[encoder]).from_pretrained(
            root / encoder, local_files_only=True, dtype=dtype
        )
    except (OSError, ValueError) as error:
        raise InputError(f"{root}: {encoder} or {tokenizer} cannot be read ({error}); download them again") from error
    ids = words(prompt, padding="max_length", max_length=tokens, truncation=True, return_tensors="pt").input_ids
    return model.to(device).eval()(ids.to(device))


def save_prompt(path: Path, embedding: dict[str, Tensor], prompt: str, root: Path) -> None:
    """Writes the result of `embed_prompt` and its provenance, for `weights.prompt`."""
    metadata: Metadata = {"prompt": prompt, "tool_version": TOOL_VERSION}
    metadata |= {f"{name}_sha256": file_sha256(root / name) for name in ENCODERS}
    save_tensors(path, embedding, metadata)
