"""Adapters as changes of the transformer's layers: conversion between layouts, sums, rank reduction.

Everything here is exact up to float32 rounding, except `reduce_rank`, which returns its error.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from layerdecomp.errors import InputError
from layerdecomp.layouts import SWAPPED, diffusers_modules, kohya_module, row_counts
from layerdecomp.models.lora import LoRAConfig

Tensors = dict[str, Tensor]
INPUT = "img_in"  # trained in full, not by LoRA


@dataclass(frozen=True)
class Change:
    """The change of one linear layer: scale * B A for its weight and, optionally, one for its bias."""

    a: Tensor  # (rank, in)
    b: Tensor  # (out, rank)
    scale: float = 1.0
    bias: Tensor | None = None  # (out,)

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def weight(self) -> Tensor:
        """(out, in), float32."""
        return self.scale * self.b.float() @ self.a.float()

    def baked(self) -> "Change":
        """The same change with the scale folded into B: alpha = rank."""
        return self if self.scale == 1 else replace(self, b=self.scale * self.b.float(), scale=1.0)


Changes = dict[str, Change]  # by the published name of the layer


def changes_from_adapter(
    tensors: Mapping[str, Tensor], lora: LoRAConfig, base: Mapping[str, Tensor]
) -> tuple[Changes, Tensors]:
    """An adapter's changes of the base, and its tensors that belong to no layer of the base (the fusion module).

    The change of the input projection becomes a pair too: A is the identity, B the difference.

    Args:
        base: the frozen img_in.weight and img_in.bias, float32.
    """
    rest = dict(tensors)
    layers = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    changes = {
        layer: Change(rest.pop(f"{layer}.lora_A.weight"), rest.pop(f"{layer}.lora_B.weight"), lora.scale)
        for layer in layers
    }
    weight, bias = (rest.pop(name).float() - base[name] for name in (f"{INPUT}.weight", f"{INPUT}.bias"))
    if weight.any() or bias.any():
        changes[INPUT] = Change(torch.eye(weight.shape[1]), weight, bias=bias if bias.any() else None)
    return changes, rest


def adapter_from_changes(changes: Changes, base: Mapping[str, Tensor]) -> tuple[LoRAConfig, Tensors]:
    """The inverse of `changes_from_adapter`: LoRA settings shared by all layers, and the adapter's tensors.

    If ranks or scales differ, smaller ranks are padded with zeros and scales are folded into B.
    """
    layers = {name: change for name, change in changes.items() if name != INPUT}
    if not layers:
        raise InputError("only the input projection is adapted; expected LoRA layers")
    rank = max(change.rank for change in layers.values())
    if len({(change.rank, change.scale) for change in layers.values()}) > 1:
        layers = {name: _padded(change.baked(), rank) for name, change in layers.items()}
    scale = next(iter(layers.values())).scale
    tensors = {f"{INPUT}.{kind}": base[f"{INPUT}.{kind}"].clone() for kind in ("weight", "bias")}
    if (change := changes.get(INPUT)) is not None:
        tensors[f"{INPUT}.weight"] += change.weight
        tensors[f"{INPUT}.bias"] += 0 if change.bias is None else change.bias.float()
    for name, change in layers.items():
        if change.bias is not None and change.bias.any():
            raise InputError(f"{name}: the LoRA changes the layer's bias; only the input projection's bias may change")
        tensors |= {f"{name}.lora_A.weight": change.a, f"{name}.lora_B.weight": change.b}
    return LoRAConfig(rank, None if scale == 1 else scale * rank, list(layers)), tensors


def _padded(change: Change, rank: int) -> Change:
    missing = rank - change.rank
    return replace(change, a=F.pad(change.a, (0, 0, 0, missing)), b=F.pad(change.b, (0, missing)))


# Other layouts


def to_diffusers(changes: Changes, hidden_size: int) -> Tensors:
    """The layout of `FluxTransformer2DModel.load_lora_adapter`: separate q, k and v, every scale 1.

    The parts of a fused layer share its A and split the rows of its B. If any layer's bias changes, PEFT expects a bias
    in every layer's B; the others are zero.
    """
    tensors: Tensors = {}
    with_bias = any(change.bias is not None for change in changes.values())
    for layer, change in changes.items():
        change = change.baked()
        parts = diffusers_modules(layer)
        bias = change.b.new_zeros(len(change.b)) if change.bias is None else change.bias
        b, bias = (_swapped(tensor) if layer == SWAPPED else tensor for tensor in (change.b, bias))
        rows = row_counts(len(b), len(parts), hidden_size)
        for part, b_part, bias_part in zip(parts, b.split_with_sizes(rows), bias.split_with_sizes(rows), strict=True):
            tensors |= {f"transformer.{part}.lora_A.weight": change.a, f"transformer.{part}.lora_B.weight": b_part}
            if with_bias:
                tensors[f"transformer.{part}.lora_B.bias"] = bias_part
    return tensors


def peft_settings(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """PEFT's settings for the tensors of `to_diffusers`, as the metadata that diffusers reads.

    The input projection's rank differs from the others'. Without these settings, diffusers before 0.40 takes the
    others' rank as its alpha, and so scales it wrongly.
    """
    ranks = {module: len(tensors[f"transformer.{module}.lora_A.weight"]) for module in _lora_modules(tensors)}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{module}": other for module, other in ranks.items() if other != rank}
    settings = {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "lora_bias": any(name.endswith(".bias") for name in tensors),
    }
    return {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in settings.items()})}


def peft_alphas(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Tensors:
    """Alphas from PEFT's settings in a file's metadata, as tensors of the layout: `NAME.alpha`.

    diffusers uses them, or alpha = rank where there are none. Raises `InputError` if they cannot be read.
    """
    try:
        settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        default = settings.get("transformer.lora_alpha")
        patterns = settings.get("transformer.alpha_pattern") or {}
        rank_stabilised = settings.get("transformer.use_rslora")
        found = {}
        for module in _lora_modules(tensors):
            matches = [alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)]
            if (alpha := [*matches, default][0]) is not None:
                found[f"transformer.{module}.alpha"] = torch.tensor(float(alpha))
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise InputError(f"lora_adapter_metadata cannot be read ({error}); expected PEFT's settings as JSON") from error
    if rank_stabilised:
        raise InputError("lora_adapter_metadata has use_rslora, which is not supported; expected alpha / rank as scale")
    return found


def _lora_modules(tensors: Mapping[str, Tensor]) -> list[str]:
    """The modules of a LoRA in diffusers layout."""
    suffix = ".lora_A.weight"
    return [name.removeprefix("transformer.").removesuffix(suffix) for name in tensors if name.endswith(suffix)]


def _swapped(tensor: Tensor) -> Tensor:
    """Swaps the upper and lower half of the rows."""
    return tensor.roll(len(tensor) // 2, 0)


def from_diffusers(tensors: Tensors, layers: Mapping[str, int], hidden_size: int) -> Changes:
    """The inverse of `to_diffusers`; removes from `tensors` those that it converts.

    Parts that share an A become one layer again; parts with different ones are stacked, so that their ranks add up.

    Args:
        layers: output widths of the layers that may be adapted, by published name.
    """
    changes = {}
    for layer, width in layers.items():
        parts = diffusers_modules(layer)
        rows = row_counts(width, len(parts), hidden_size)
        found = [_take_pair(tensors, f"transformer.{part}", "lora_A", "lora_B") for part in parts]
        if all(change is None for change in found):
            continue
        pieces = [
            Change(torch.empty(0, 0), torch.zeros(n, 0)) if change is None else change
            for change, n in zip(found, rows, strict=True)
        ]
        change = _stacked(pieces)
        if layer == SWAPPED:
            change = replace(change, b=_swapped(change.b), bias=None if change.bias is None else _swapped(change.bias))
        changes[layer] = change
    return changes


def _stacked(pieces: list[Change]) -> Change:
    """One layer's change from those of the parts of its output, in row order."""
    if len(pieces) == 1:
        return pieces[0]
    used = [piece for piece in pieces if piece.rank]
    biases = [piece.b.new_zeros(len(piece.b)) if piece.bias is None else piece.bias for piece in pieces]
    bias = torch.cat(biases) if any(piece.bias is not None for piece in pieces) else None
    first = used[0]
    if all(piece.a.equal(first.a) and piece.scale == first.scale for piece in used):
        zero = first.b.new_zeros
        rows = [piece.b if piece.rank else zero(len(piece.b), first.rank) for piece in pieces]
        return Change(first.a, torch.cat(rows), first.scale, bias)
    b = torch.block_diag(*(piece.baked().b for piece in pieces))
    return Change(torch.cat([piece.a for piece in used]), b, bias=bias)


def to_kohya(changes: Changes, hidden_size: int) -> Tensors:
    """The layout of ComfyUI and sd-scripts: layers as published, each with an alpha that holds its scale."""
    tensors: Tensors = {}
    for layer, change in changes.items():
        name = kohya_module(layer)
        tensors |= {f"{name}.lora_down.weight": change.a, f"{name}.lora_up.weight": change.b}
        tensors[f"{name}.alpha"] = torch.tensor(change.scale * change.rank)
        if change.bias is not None:
            tensors[f"{name}.diff_b"] = change.bias
    return tensors


def from_kohya(tensors: Tensors, layers: Mapping[str, int], hidden_size: int) -> Changes:
    """The inverse of `to_kohya`; removes from `tensors` those that it converts."""
    found = {layer: _take_pair(tensors, kohya_module(layer), "lora_down", "lora_up") for layer in layers}
    return {layer: change for layer, change in found.items() if change is not None}


def _take_pair(tensors: Tensors, name: str, down: str, up: str) -> Change | None:
    pair = f"{name}.{down}.weight", f"{name}.{up}.weight"
    if any(half not in tensors for half in pair):
        return None
    a, b = (tensors.pop(half) for half in pair)
    alpha = tensors.pop(f"{name}.alpha", None)
    bias = tensors.pop(f"{name}.{up}.bias", tensors.pop(f"{name}.diff_b", None))
    scale = 1.0 if alpha is None else alpha.item() / a.shape[0]
    return Change(a, b, scale, bias if bias is not None and bias.any() else None)


class LoRALayout(NamedTuple):
    """A layout of LoRA files."""

    prefix: str  # of the tensors' names
    write: Callable[[Changes, int], Tensors]
    read: Callable[[Tensors, Mapping[str, int], int], Changes]


LAYOUTS = {
    "diffusers": LoRALayout("transformer.", to_diffusers, from_diffusers),
    "kohya": LoRALayout("lora_unet_", to_kohya, from_kohya),
}


# Sums and rank reduction


def add_changes(parts: Sequence[tuple[Changes, float]]) -> Changes:
    """The weighted sum of several adapters' changes; ranks add up."""
    total: Changes = {}
    for changes, share in parts:
        for layer, change in changes.items():
            change = change.baked()
            bias = None if change.bias is None else share * change.bias.float()
            change = Change(change.a, share * change.b.float(), bias=bias)
            total[layer] = _sum(total[layer], change) if layer in total else change
    return total


def _sum(first: Change, second: Change) -> Change:
    biases = [change.bias for change in (first, second) if change.bias is not None]
    bias = torch.stack(biases).sum(0) if biases else None
    return Change(torch.cat([first.a, second.a]), torch.cat([first.b, second.b], dim=1), bias=bias)


def add_whole(parts: Sequence[tuple[Tensors, float]], base: Mapping[str, Tensor]) -> Tensors:
    """The weighted sum of the base's layers that are trained in full, as changes; of other tensors, the weighted mean.

    Raises:
        InputError: names or shapes differ, or the weights have no mean.
    """
    (first, _), *others = parts
    shapes = {name: tensor.shape for name, tensor in first.items()}
    if any({name: tensor.shape for name, tensor in tensors.items()} != shapes for tensors, _ in others):
        raise InputError("the adapters' tensors besides LoRA differ in name or size; expected adapters of one model")
    whole = sum(share for _, share in parts)
    if whole == 0 and first.keys() - base.keys():
        raise InputError("weights= sum up to 0; expected a non-zero sum, since the fusion modules are averaged")
    total = {name: torch.stack([share * tensors[name].float() for tensors, share in parts]).sum(0) for name in first}
    return {name: value + (1 - whole) * base[name] if name in base else value / whole for name, value in total.items()}


def reduce_rank(changes: Changes, rank: int) -> tuple[Changes, dict[str, float]]:
    """The nearest changes of at most `rank`, by truncated SVD (Eckart and Young 1936), and their errors.

    The input projection is left unchanged.

    Returns:
        The changes, and the relative error of each layer's weight change in the Frobenius norm; "all" is that of all
        layers together.
    """
    reduced = {**changes}
    lost, whole = {}, {}  # squared norms of what is dropped of a layer's change, and of all of it
    for layer, change in changes.items():
        if layer == INPUT:
            continue
        q_b, r_b = torch.linalg.qr(change.b.float() * change.scale)  # (out, r), (r, rank)
        q_a, r_a = torch.linalg.qr(change.a.float().T)  # (in, r), (r, rank)
        u, values, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        root = values[:rank].sqrt()
        reduced[layer] = Change(root[:, None] * (v[:rank] @ q_a.T), (q_b @ u[:, :rank]) * root, bias=change.bias)
        lost[layer] = values[rank:].square().sum().item()
        whole[layer] = values.square().sum().item()
    errors = {layer: (lost[layer] / whole[layer]) ** 0.5 if whole[layer] else 0.0 for layer in lost}
    total = sum(whole.values())
    return reduced, {**errors, "all": (sum(lost.values()) / total) ** 0.5 if total else 0.0}
