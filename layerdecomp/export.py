"""An adapter in other forms: re-saved, or folded into its base."""

from pathlib import Path

import torch

from layerdecomp.decomposer import build_decomposer, describe_adapter
from layerdecomp.errors import InputError
from layerdecomp.models.lora import merge_lora
from layerdecomp.weights import save_model, save_tensors

FORMATS = ("adapter", "merged")


def export(path: str | Path, format: str, out: str | Path) -> list[Path]:
    """Writes an adapter file in another form.

    Args:
        path: adapter.safetensors.
        format: "adapter": the same tensors in bf16. "merged": the whole transformer with LoRA and input projection
            folded in, in the published layout and bf16, and beside it the fusion module, for which that layout has no
            room, as `<out>.context_fusion.safetensors`.
        out: the file to write.

    Returns:
        The files written.

    Raises:
        InputError: an unknown format, or an adapter whose frozen parts are missing or do not fit.
    """
    if format not in FORMATS:
        raise InputError(f"format={format}: expected one of {', '.join(FORMATS)}")
    out = Path(out)
    adapter, config = describe_adapter(path)
    if format == "adapter":
        tensors = {name: tensor.to(torch.bfloat16) for name, tensor in adapter.tensors.items()}
        save_tensors(out, tensors, adapter.metadata)
        return [out]
    decomposer = build_decomposer(config, torch.bfloat16)
    decomposer.load_adapter(adapter, path)
    merge_lora(decomposer.transformer)
    facts = {name: text for name, text in adapter.metadata.items() if name not in ("lora", "weights")}
    save_model(out, decomposer.transformer, {**facts, "merged": "yes"})
    if decomposer.context_fusion is None:
        return [out]
    beside = out.with_suffix(".context_fusion.safetensors")
    save_tensors(beside, decomposer.context_fusion.state_dict(), adapter.metadata)
    return [out, beside]
