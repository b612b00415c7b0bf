"""Depth-Anything-V2: relative inverse depth from one image, by a DINOv2 backbone with a dense-prediction head.

Neck and head use the parameter names of the published `Depth-Anything-V2-Small-hf/model.safetensors`, the backbone
those of timm; `published_names` maps each name to the file's.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from layerdecomp.errors import InputError

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RESIZE_FACTORS = (4, 2, 1, 0.5)  # of the four feature maps, relative to the patch grid


@dataclass
class DepthConfig:
    """Sizes of a `DepthEstimator`; the defaults are Depth-Anything-V2-Small's (`vit_small_patch14_dinov2` in timm)."""

    image_size: int = 518  # images are resized to about this; the position embedding's grid covers its square
    patch_size: int = 14
    embed_dim: int = 384
    depth: int = 12
    num_heads: int = 6
    feature_blocks: list[int] = field(default_factory=lambda: [2, 5, 8, 11])  # whose outputs the neck reads, from 0
    neck_widths: list[int] = field(default_factory=lambda: [48, 96, 192, 384])
    fusion_width: int = 64
    head_width: int = 32

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise InputError(f"depth: patch_size = {self.patch_size} does not divide image_size = {self.image_size}")
        if self.embed_dim % self.num_heads:
            raise InputError(f"depth: num_heads = {self.num_heads} does not divide embed_dim = {self.embed_dim}")
        for key in ("feature_blocks", "neck_widths"):
            if len(getattr(self, key)) != len(RESIZE_FACTORS):
                raise InputError(f"depth.{key} is {getattr(self, key)}; expected {len(RESIZE_FACTORS)} numbers")
        if any(a >= b for a, b in pairwise([-1, *self.feature_blocks, self.depth])):
            raise InputError(
                f"depth.feature_blocks is {self.feature_blocks}; expected rising numbers of blocks, 0 to "
                f"{self.depth - 1}"
            )


def build_backbone(config: DepthConfig) -> "VisionTransformer":
    """DINOv2 under timm's parameter names."""
    # Imported lazily: it takes as long as the rest of this package, and few runs need depth.
    from timm.models.vision_transformer import VisionTransformer

    backbone = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        init_values=1.0,  # enables layer scale; the values come from the file
        num_classes=0,
        dynamic_img_size=True,
        weight_init="skip",
    )
    # In the published file, but used only to train DINOv2 itself.
    backbone.register_parameter("mask_token", nn.Parameter(torch.zeros(1, config.embed_dim)))
    return backbone


class ReassembleLayer(nn.Module):
    """(B, embed_dim, h, w) -> (B, width, factor * h, factor * w), the size rounded up."""

    def __init__(self, embed_dim: int, width: int, factor: float) -> None:
        super().__init__()
        self.projection = nn.Conv2d(embed_dim, width, 1)
        self.resize: nn.Module = nn.Identity()
        if factor > 1:
            self.resize = nn.ConvTranspose2d(width, width, int(factor), stride=int(factor))
        elif factor < 1:
            self.resize = nn.Conv2d(width, width, 3, stride=int(1 / factor), padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.resize(self.projection(x))


class ReassembleStage(nn.Module):
    def __init__(self, config: DepthConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            ReassembleLayer(config.embed_dim, width, factor)
            for width, factor in zip(config.neck_widths, RESIZE_FACTORS, strict=True)
        )

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        return [layer(feature) for layer, feature in zip(self.layers, features, strict=True)]


class ResidualLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolution1 = nn.Conv2d(width, width, 3, padding=1)
        self.convolution2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.convolution1(F.relu(x))
        return x + self.convolution2(F.relu(h))


class FusionLayer(nn.Module):
    """Adds a feature map to the fused coarser ones and upsamples the sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(width, width, 1)
        self.residual_layer1 = ResidualLayer(width)  # unused in the coarsest layer
        self.residual_layer2 = ResidualLayer(width)

    def forward(self, x: Tensor | None, feature: Tensor, size: tuple[int, int]) -> Tensor:
        """x and feature (B, fusion_width, h, w) -> (B, fusion_width, *size); x is None for the coarsest feature."""
        x = self.residual_layer2(feature if x is None else x + self.residual_layer1(feature))
        return self.projection(enlarge(x, size))


class FusionStage(nn.Module):
    def __init__(self, config: DepthConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FusionLayer(config.fusion_width) for _ in RESIZE_FACTORS)  # the coarsest first

    def forward(self, features: list[Tensor]) -> Tensor:
        """Maps (B, fusion_width, h_i, w_i), the finest first -> (B, fusion_width, 2 h_0, 2 w_0)."""
        height, width = features[0].shape[-2:]
        sizes = [(2 * height, 2 * width), *(feature.shape[-2:] for feature in features[:-1])]
        x: Tensor | None = None
        for layer, feature, size in zip(self.layers, reversed(features), reversed(sizes), strict=True):
            x = layer(x, feature, size)
        assert x is not None
        return x


class Neck(nn.Module):
    """Four maps (B, embed_dim, h, w) of the backbone -> one (B, fusion_width, 8 h, 8 w)."""

    def __init__(self, config: DepthConfig) -> None:
        super().__init__()
        self.reassemble_stage = ReassembleStage(config)
        self.convs = nn.ModuleList(
            nn.Conv2d(width, config.fusion_width, 3, padding=1, bias=False) for width in config.neck_widths
        )
        self.fusion_stage = FusionStage(config)

    def forward(self, features: list[Tensor]) -> Tensor:
        features = self.reassemble_stage(features)
        return self.fusion_stage([conv(x) for conv, x in zip(self.convs, features, strict=True)])


class Head(nn.Module):
    def __init__(self, config: DepthConfig) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(config.fusion_width, config.fusion_width // 2, 3, padding=1)
        self.conv2 = nn.Conv2d(config.fusion_width // 2, config.head_width, 3, padding=1)
        self.conv3 = nn.Conv2d(config.head_width, 1, 1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, fusion_width, h, w) -> non-negative (B, *size)."""
        x = F.relu(self.conv2(enlarge(self.conv1(x), size)))
        return F.relu(self.conv3(x)).squeeze(1)


def enlarge(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


class DepthEstimator(nn.Module):
    """Relative inverse depth of an image (larger is nearer), up to an unknown scale and shift."""

    def __init__(self, config: DepthConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = build_backbone(config)
        self.neck = Neck(config)
        self.head = Head(config)

    def forward(self, x: Tensor) -> Tensor:
        """Non-negative depth (B, H, W) of `preprocess`ed images (B, 3, H, W), H and W multiples of the patch size."""
        return self.head(self.neck(self.features(x)), x.shape[-2:])

    def features(self, x: Tensor) -> list[Tensor]:
        """The backbone's maps (B, embed_dim, H/14, W/14) that the neck reads."""
        patches = self.backbone.patch_embed(x)  # (B, h, w, D)
        height, width = patches.shape[1:3]
        cls_token = cast(Tensor, self.backbone.cls_token).expand(len(x), -1, -1)
        tokens = torch.cat([cls_token, patches.flatten(1, 2)], dim=1)
        tokens = tokens + self.position_embedding(height, width)  # (B, 1 + h w, D)
        features = []
        for i, block in enumerate(self.backbone.blocks):
            tokens = block(tokens)
            if i in self.config.feature_blocks:
                patches = self.backbone.norm(tokens)[:, 1:]
                features.append(rearrange(patches, "B (h w) D -> B D h w", h=height))
        return features

    def position_embedding(self, height: int, width: int) -> Tensor:
        """(1, 1 + height * width, D), resampled from the trained grid.

        Without antialiasing, unlike timm's own resampling: the weights were trained without it.
        """
        embedding = cast(Tensor, self.backbone.pos_embed)
        grid = rearrange(embedding[:, 1:], "1 (h w) D -> 1 D h w", h=self.config.image_size // self.config.patch_size)
        grid = F.interpolate(grid.float(), (height, width), mode="bicubic").to(embedding.dtype)
        return torch.cat([embedding[:, :1], rearrange(grid, "1 D h w -> 1 (h w) D")], dim=1)

    @torch.no_grad()
    def estimate(self, images: Tensor) -> Tensor:
        """Relative inverse depth (B, 1, H, W), float32, of RGB images (B, 3, H, W) in [-1, 1] of any size.

        Scaled to [-1, 1] per image, so that 1 is the nearest pixel; 0 everywhere if the depth is constant.
        """
        depth = self(preprocess(images, self.config).to(self.head.conv1.weight.dtype))
        depth = F.interpolate(depth[:, None].float(), images.shape[-2:], mode="bicubic", antialias=True)
        low, high = depth.amin((1, 2, 3), keepdim=True), depth.amax((1, 2, 3), keepdim=True)
        constant = high - low <= 1e-6 * high  # resizing a constant leaves rounding differences
        return (2 * (depth - low) / (high - low) - 1).masked_fill(constant, 0.0)


def preprocess(images: Tensor, config: DepthConfig) -> Tensor:
    """RGB (B, 3, H, W) in [-1, 1] of any size -> (B, 3, *input_size(H, W)), normalised as the backbone expects."""
    size = input_size(images.shape[-2], images.shape[-1], config)
    resized = F.interpolate(images.float(), size, mode="bicubic", antialias=True).clamp(-1, 1)
    mean, std = (resized.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((resized + 1) / 2 - mean) / std


def input_size(height: int, width: int, config: DepthConfig) -> tuple[int, int]:
    """Input (height, width): whole patches at about the same aspect ratio, as in the published preprocessing.

    The side that changes the least becomes `image_size`: the shorter one of a large image, the longer one of a small.
    """
    scale = min((config.image_size / side for side in (height, width)), key=lambda scale: abs(1 - scale))
    rows, columns = (max(1, round(scale * side / config.patch_size)) for side in (height, width))
    return rows * config.patch_size, columns * config.patch_size


PUBLISHED_NAMES = {
    "backbone.cls_token": "backbone.embeddings.cls_token",
    "backbone.mask_token": "backbone.embeddings.mask_token",
    "backbone.pos_embed": "backbone.embeddings.position_embeddings",
    "backbone.patch_embed.proj.": "backbone.embeddings.patch_embeddings.projection.",
    "backbone.blocks.": "backbone.encoder.layer.",
    "backbone.norm.": "backbone.layernorm.",
    ".attn.proj.": ".attention.output.dense.",
    ".ls1.gamma": ".layer_scale1.lambda1",
    ".ls2.gamma": ".layer_scale2.lambda1",
}


def published_names(name: str) -> list[str]:
    """Names of the published tensors whose rows, concatenated, form a `DepthEstimator`'s parameter `name`."""
    for ours, published in PUBLISHED_NAMES.items():
        name = name.replace(ours, published)
    if ".attn.qkv." not in name:
        return [name]
    return [name.replace(".attn.qkv.", f".attention.attention.{part}.") for part in ("query", "key", "value")]
