"""Small models of the libraries, and classes that other code bases have copied."""

from __future__ import annotations

import copy
import importlib.metadata
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greenmim_kernels.integrations import fuse_window_attention


def _of_timm(make: Callable[..., nn.Module], more: dict) -> nn.Module:
    sizes = dict(img_size=56, patch_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4))
    sizes |= dict(window_size=4, num_classes=5, drop_path_rate=0.0)
    return make(**(sizes | more))


def timm_swin(**more) -> nn.Module:
    timm = pytest.importorskip("timm")
    return _of_timm(timm.models.swin_transformer.SwinTransformer, more)


def timm_swin_v2(**more) -> nn.Module:
    timm = pytest.importorskip("timm")
    return _of_timm(timm.models.swin_transformer_v2.SwinTransformerV2, more)


def swin2sr(**more) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = dict(image_size=16, embed_dim=16, depths=[2], num_heads=[2], window_size=4)
    return transformers.Swin2SRModel(
        transformers.Swin2SRConfig(**(sizes | dict(mlp_ratio=2.0, drop_path_rate=0.0) | more))
    )


def timm_maxvit(**more) -> nn.Module:
    """Grids of 24 x 16 and 12 x 8 tokens in windows of 4 x 2; grid attention in as large ones."""
    maxxvit = pytest.importorskip("timm").models.maxxvit
    sizes = dict(dim_head=8, window_size=(4, 2), norm_eps=1e-5)
    model = maxxvit.MaxxVit(
        maxxvit.MaxxVitCfg(
            embed_dim=(16, 32),
            depths=(1, 1),
            block_type=("M", "M"),
            stem_width=8,
            conv_cfg=maxxvit.MaxxVitConvCfg(block_type="convnext", init_values=None),
            transformer_cfg=maxxvit.MaxxVitTransformerCfg(**(sizes | more)),
        ),
        img_size=(96, 64),
        num_classes=5,
    )
    for module in model.modules():
        if type(module).__name__ == "RelPosMlp":
            module.mlp.drop1.p = 0.0
    return model


def torchvision_maxvit(**more) -> nn.Module:
    models = pytest.importorskip("torchvision").models
    sizes = dict(input_size=(48, 48), stem_channels=8, partition_size=3, block_channels=[16, 32])
    sizes |= dict(block_layers=[1, 1], head_dim=8, stochastic_depth_prob=0.0, num_classes=5)
    # Batch norm magnifies rounding, where batches are as small as here.
    sizes |= dict(norm_layer=partial(nn.GroupNorm, 1))
    return models.MaxVit(**(sizes | more))


def torchvision_swin(version: int = 1, **more) -> nn.Module:
    models = pytest.importorskip("torchvision").models.swin_transformer
    sizes = dict(patch_size=[4, 4], embed_dim=16, depths=[2, 2], num_heads=[2, 4])
    sizes |= dict(window_size=[4, 4], num_classes=5, stochastic_depth_prob=0.0)
    if version == 2:
        sizes |= dict(block=models.SwinTransformerBlockV2, downsample_layer=models.PatchMergingV2)
    return models.SwinTransformer(**(sizes | more))


def torchvision_3d(**more) -> nn.Module:
    models = pytest.importorskip("torchvision").models.video.swin_transformer
    sizes = dict(patch_size=[2, 4, 4], embed_dim=16, depths=[2, 2], num_heads=[2, 4])
    sizes |= dict(window_size=[3, 4, 4], num_classes=5, stochastic_depth_prob=0.0)
    return models.SwinTransformer3d(**(sizes | more))


def hugging_face(version: int = 1, **more) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig if version == 1 else transformers.Swinv2Config
    model = transformers.SwinModel if version == 1 else transformers.Swinv2Model
    sizes = dict(image_size=36, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4])
    sizes |= dict(window_size=4, drop_path_rate=0.0)
    implementation = {"attn_implementation": more.pop("implementation", "eager")}
    return model._from_config(config(**(sizes | more)), **implementation)


def donut(**more) -> nn.Module:
    """Attention as transformers had it in Swin before version 5."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(image_size=36, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4])
    sizes |= dict(window_size=4, drop_path_rate=0.0)
    return transformers.DonutSwinModel(transformers.DonutSwinConfig(**(sizes | more)))


def maskformer(**more) -> nn.Module:
    module = pytest.importorskip("transformers.models.maskformer.modeling_maskformer_swin")
    sizes = dict(image_size=36, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4])
    sizes |= dict(window_size=4, drop_path_rate=0.0)
    return module.MaskFormerSwinModel(module.MaskFormerSwinConfig(**(sizes | more)))


def clap(**more) -> nn.Module:
    """Swin on spectrograms, [B, 1, time, frequency]."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(spec_size=48, num_mel_bins=12, patch_size=4, patch_stride=(4, 4), window_size=4)
    sizes |= dict(patch_embeds_hidden_size=16, depths=[2, 2], num_attention_heads=[2, 4])
    sizes |= dict(hidden_size=32, drop_path_rate=0.0, hidden_dropout_prob=0.0)
    sizes |= dict(attention_probs_dropout_prob=0.0)
    return transformers.ClapAudioModel(transformers.ClapAudioConfig(**(sizes | more)))


def monai(axes: int = 3, **more) -> nn.Module:
    nets = pytest.importorskip("monai.networks.nets")
    pytest.importorskip("einops")
    sizes = dict(in_channels=1, out_channels=2, feature_size=12, depths=(2, 2, 1, 1))
    sizes |= dict(num_heads=(1, 2, 3, 6), window_size=3, spatial_dims=axes)
    return nets.SwinUNETR(**(sizes | more))


def spandrel(name: str, **more) -> nn.Module:
    """Image restoration: one resolution, and images of any size."""
    module = pytest.importorskip(f"spandrel.architectures.{name}")
    sizes = dict(img_size=16, embed_dim=16, depths=[2], num_heads=[2], window_size=4)
    sizes |= dict(mlp_ratio=2, drop_path_rate=0.0, upscale=2, upsampler="pixelshuffle")
    return getattr(module, name)(**(sizes | more))


class MonaiEncoder(nn.Module):
    """SwinUNETR's encoder, whose feature maps it returns as one vector.

    Its decoder magnifies rounding: it normalizes maps of few values.
    """

    def __init__(self, axes: int, **more) -> None:
        super().__init__()
        self.swin = monai(axes, **more).swinViT

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([features.flatten() for features in self.swin(x)])


def _version(package: str) -> tuple[int, ...]:
    try:
        return tuple(int(x) for x in importlib.metadata.version(package).split(".")[:3])
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return ()


# Before, timm's SwinV2 had no mask for a grid that its window does not divide.
PADS_V2 = _version("timm") >= (1, 0, 31)


def first(out) -> Tensor:
    """The tensor of what a model returns."""
    return out if isinstance(out, Tensor) else out[0]


@dataclass(frozen=True)
class Library:
    make: Callable[..., nn.Module]
    inputs: tuple[tuple[int, ...], ...]  # shapes; the first is the one the model is made for
    fused: str  # the class that is replaced
    is_cosine: bool = False


LIBRARIES = {
    # 14 x 14 and 7 x 7 tokens in windows of 4: padded at both stages, shifted at both.
    "timm": Library(timm_swin, ((2, 3, 56, 56),), "SwinTransformerBlock"),
    "timm_v2": Library(
        partial(timm_swin_v2, img_size=56 if PADS_V2 else 64),
        ((2, 3, 56, 56) if PADS_V2 else (2, 3, 64, 64),),
        "SwinTransformerV2Block",
        True,
    ),
    # Sizes are free here: windows that divide, that do not, and larger ones than the grid.
    "torchvision": Library(
        torchvision_swin, ((2, 3, 56, 40), (1, 3, 64, 64), (1, 3, 12, 28)), "ShiftedWindowAttention"
    ),
    "torchvision_v2": Library(
        partial(torchvision_swin, 2),
        ((2, 3, 56, 40), (1, 3, 12, 28)),
        "ShiftedWindowAttentionV2",
        True,
    ),
    "torchvision_3d": Library(
        torchvision_3d, ((2, 3, 16, 56, 40), (1, 3, 4, 32, 12)), "ShiftedWindowAttention3d"
    ),
    "hugging_face": Library(hugging_face, ((2, 3, 36, 36),), "SwinLayer"),
    "hugging_face_sdpa": Library(
        partial(hugging_face, implementation="sdpa"), ((2, 3, 36, 36),), "SwinLayer"
    ),
    "hugging_face_v2": Library(partial(hugging_face, 2), ((2, 3, 36, 36),), "Swinv2Layer", True),
    "hugging_face_swin2sr": Library(swin2sr, ((1, 3, 16, 12), (2, 3, 8, 16)), "Swin2SRLayer", True),
    "hugging_face_donut": Library(donut, ((2, 3, 36, 36),), "DonutSwinLayer"),
    "hugging_face_maskformer": Library(maskformer, ((2, 3, 36, 36),), "MaskFormerSwinLayer"),
    "hugging_face_clap": Library(clap, ((2, 1, 192, 12),), "ClapAudioLayer"),
    # Windows, and grids of tokens that are apart; each kind of bias, both orders of q, k and v.
    "timm_maxvit": Library(timm_maxvit, ((2, 3, 96, 64),), "PartitionAttentionCl"),
    "timm_maxvit_mlp": Library(
        partial(timm_maxvit, rel_pos_type="mlp", init_values=0.5),
        ((2, 3, 96, 64),),
        "PartitionAttentionCl",
    ),
    "timm_maxvit_tf": Library(
        partial(timm_maxvit, rel_pos_type="bias_tf", head_first=False),
        ((2, 3, 96, 64),),
        "PartitionAttentionCl",
    ),
    "torchvision_maxvit": Library(torchvision_maxvit, ((2, 3, 48, 48),), "PartitionAttentionLayer"),
    # The size that they are made for, another one, and a single window.
    "swin_ir": Library(
        partial(spandrel, "SwinIR"),
        ((2, 3, 16, 16), (1, 3, 12, 20), (1, 3, 4, 4)),
        "SwinTransformerBlock",
    ),
    "swin2_sr": Library(
        partial(spandrel, "Swin2SR"),
        ((2, 3, 16, 16), (1, 3, 12, 20)),
        "SwinTransformerBlock",
        True,
    ),
    "drct": Library(
        partial(spandrel, "DRCT", gc=8),
        ((2, 3, 16, 16), (1, 3, 12, 20)),
        "SwinTransformerBlock",
    ),
    "hat": Library(
        partial(spandrel, "HAT", squeeze_factor=4),
        ((2, 3, 16, 16), (1, 3, 12, 20)),
        "WindowAttention",
    ),
    # Grids of 24 to 2 a side, in windows of 3.
    "monai_3d": Library(partial(MonaiEncoder, 3), ((1, 1, 48, 32, 32),), "BasicLayer"),
    "monai_2d": Library(partial(MonaiEncoder, 2), ((2, 1, 64, 32),), "BasicLayer"),
}


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """With weights that hide nothing: norms at the end of branches start at zero, tables small."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            drawn = torch.randn(weight.shape, generator=draw, dtype=torch.float64)
            if "table" in name:
                weight.copy_(drawn)
            elif "logit_scale" in name:
                weight.copy_(math.log(10) + 0.3 * drawn)
            elif weight.dim() == 1:
                weight.add_(0.1 * drawn + 0.2)
    return model


# --- classes as other code bases have them: names, buffers and signatures ------------------------


def swin_index(window: tuple[int, ...]) -> Tensor:
    axes = torch.meshgrid(*[torch.arange(side) for side in window], indexing="ij")
    place = torch.stack([axis.flatten() for axis in axes], -1)
    apart = place[:, None] - place[None, :]
    index = torch.zeros(len(place), len(place), dtype=torch.long)
    for axis, side in enumerate(window):
        index = index * (2 * side - 1) + apart[..., axis] + side - 1
    return index


def attended(m: nn.Module, scores: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """What both versions do with scores [B windows, heads, n, n] and v [..., n, D]."""
    if mask is not None:
        masked = scores.view(-1, len(mask), *scores.shape[1:]) + mask[:, None]
        scores = masked.view(scores.shape)
    maps = m.attn_drop(m.softmax(scores))
    return m.proj_drop(m.proj((maps @ v).transpose(1, 2).flatten(2)))


class WindowAttention(nn.Module):
    """Microsoft's Swin and SimMIM."""

    def __init__(self, dim, window_size, num_heads, qkv_bias=True, attn_drop=0.0, proj_drop=0.0):
        super().__init__()
        self.dim, self.window_size, self.num_heads = dim, window_size, num_heads
        self.scale = (dim // num_heads) ** -0.5
        rows = math.prod(2 * side - 1 for side in window_size)
        self.relative_position_bias_table = nn.Parameter(torch.randn(rows, num_heads))
        self.register_buffer("relative_position_index", swin_index(window_size))
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.softmax = nn.Softmax(dim=-1)

    def index(self, slots: int) -> Tensor:
        return self.relative_position_index

    def forward(self, x, mask=None):
        windows, slots, _ = x.shape
        qkv = self.qkv(x).reshape(windows, slots, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        scores = (q * self.scale) @ k.transpose(-2, -1)
        bias = self.relative_position_bias_table[self.index(slots).reshape(-1)]
        scores = scores + bias.view(slots, slots, -1).permute(2, 0, 1)
        return attended(self, scores, v, mask)


class WindowAttention3D(WindowAttention):
    """Video-Swin's, which cuts its index to the windows it gets."""

    def index(self, slots: int) -> Tensor:
        return self.relative_position_index[:slots, :slots]


class WindowMSA(WindowAttention):
    """MMDetection's, MMSegmentation's and MMPretrain's."""

    def __init__(self, embed_dims, num_heads, window_size):
        super().__init__(embed_dims, window_size, num_heads)
        self.embed_dims = embed_dims
        high, wide = self.window_size
        along = torch.arange(wide)[None] + torch.arange(high)[:, None] * (2 * wide - 1)
        along = along.reshape(1, -1)
        index = (along + along.T).flip(1).contiguous()
        self.register_buffer("relative_position_index", index)


class WindowAttentionV2(nn.Module):
    """Microsoft's SwinV2."""

    def __init__(self, dim, window_size, num_heads, qkv_bias=True, attn_drop=0.0, proj_drop=0.0):
        super().__init__()
        self.dim, self.window_size, self.num_heads = dim, window_size, num_heads
        self.logit_scale = nn.Parameter(torch.log(10 * torch.ones(num_heads, 1, 1)))
        self.cpb_mlp = nn.Sequential(
            nn.Linear(2, 32), nn.ReLU(inplace=True), nn.Linear(32, num_heads, bias=False)
        )
        high, wide = window_size
        sides = (torch.arange(1.0 - side, side) for side in window_size)
        axes = torch.meshgrid(*sides, indexing="ij")
        table = torch.stack([8 * axes[0] / (high - 1), 8 * axes[1] / (wide - 1)], -1)[None]
        table = table.sign() * torch.log2(table.abs() + 1) / 3
        self.register_buffer("relative_coords_table", table)
        self.register_buffer("relative_position_index", swin_index(window_size))
        self.qkv = nn.Linear(dim, dim * 3, bias=False)
        self.q_bias = nn.Parameter(torch.randn(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.randn(dim)) if qkv_bias else None
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x, mask=None):
        windows, slots, _ = x.shape
        bias = None
        if self.q_bias is not None:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias)
        qkv = qkv.reshape(windows, slots, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        scores = scores * self.logit_scale.clamp(max=math.log(100)).exp()
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        bias = table[self.relative_position_index.view(-1)].view(slots, slots, -1)
        scores = scores + 16 * bias.permute(2, 0, 1).sigmoid()
        return attended(self, scores, v, mask)


class SwinTransformerBlock(nn.Module):
    """Microsoft's, for grids of one size."""

    make = WindowAttention

    def __init__(self, dim, input_resolution, num_heads, window_size, shift_size, drop_path=0.0):
        super().__init__()
        self.input_resolution, self.window_size = input_resolution, window_size
        self.shift_size = shift_size
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = self.make(dim, (window_size, window_size), num_heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.drop_path = nn.Dropout(drop_path)
        part = torch.zeros(input_resolution)
        for axis in range(2 if shift_size else 0):
            along = part.movedim(axis, 0)
            along[-window_size:] += 3**axis
            along[-shift_size:] += 3**axis
        part = self.cut(part[None, ..., None])[..., 0]
        mask = -100.0 * (part[:, :, None] != part[:, None]) if shift_size else None
        self.register_buffer("attn_mask", mask)

    def cut(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B windows, n, C]"""
        x = x.unflatten(1, (-1, self.window_size)).unflatten(3, (-1, self.window_size))
        return x.transpose(2, 3).flatten(0, 2).flatten(1, 2)

    def attend(self, x: Tensor) -> Tensor:
        high, wide = self.input_resolution
        assert x.shape[1] == high * wide, "input feature has wrong size"
        y = torch.roll(x.unflatten(1, (high, wide)), (-self.shift_size,) * 2, (1, 2))
        y = self.attn(self.cut(y), mask=self.attn_mask)
        windows = high // self.window_size, wide // self.window_size
        y = y.unflatten(0, (-1, *windows)).unflatten(3, (self.window_size,) * 2)
        y = y.transpose(2, 3).flatten(1, 2).flatten(2, 3)
        return torch.roll(y, (self.shift_size,) * 2, (1, 2)).flatten(1, 2)

    def forward(self, x):
        x = x + self.drop_path(self.attend(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class SwinTransformerBlockV2(SwinTransformerBlock):
    make = WindowAttentionV2

    def forward(self, x):
        x = x + self.drop_path(self.norm1(self.attend(x)))
        return x + self.drop_path(self.norm2(self.mlp(x)))


class SwinTransformerBlock3D(nn.Module):
    """Video-Swin's, for clips of any size: padded, then rolled; the mask comes with the call."""

    def __init__(self, dim, num_heads, window_size, shift_size):
        super().__init__()
        self.window_size, self.shift_size = window_size, shift_size
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = WindowAttention3D(dim, window_size, num_heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def sizes(self, x):
        """Window and shift on the clip [B, D, H, W, C]."""
        axes = list(zip(x.shape[1:4], self.window_size, self.shift_size, strict=True))
        return [min(n, m) for n, m, _ in axes], [0 if n <= m else s for n, m, s in axes]

    def cut(self, x, window):
        """[B, D, H, W, C], padded -> [B windows, n, C]"""
        for axis, side in zip((1, 3, 5), window, strict=True):
            x = x.unflatten(axis, (-1, side))
        return x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(0, 3).flatten(1, 3)

    def padded(self, x, window):
        after = [-n % m for n, m in zip(x.shape[1:4], window, strict=True)]
        return F.pad(x, (0, 0, 0, after[2], 0, after[1], 0, after[0]))

    def mask(self, x):
        window, shift = self.sizes(x)
        part = torch.zeros_like(self.padded(x[:1, ..., :1], window))
        for axis in range(3):
            if shift[axis]:
                along = part.movedim(axis + 1, 0)
                along[-window[axis] :] += 3**axis
                along[-shift[axis] :] += 3**axis
        part = self.cut(part, window)[..., 0]
        return -100.0 * (part[:, :, None] != part[:, None]).to(x.dtype)

    def forward_part1(self, x, mask_matrix):
        size, (window, shift) = x.shape[1:4], self.sizes(x)
        x = self.padded(self.norm1(x), window)
        whole = x.shape
        x = self.cut(torch.roll(x, [-s for s in shift], (1, 2, 3)), window)
        x = self.attn(x, mask_matrix if any(shift) else None)
        counts = [n // m for n, m in zip(whole[1:4], window, strict=True)]
        x = x.view(whole[0], *counts, *window, whole[-1]).permute(0, 1, 4, 2, 5, 3, 6, 7)
        x = torch.roll(x.reshape(whole), shift, (1, 2, 3))
        return x[:, : size[0], : size[1], : size[2]].contiguous()

    def forward(self, x):
        x = x + self.forward_part1(x, self.mask(x))
        return x + self.mlp(self.norm2(x))


class ShiftWindowMSA(nn.Module):
    """MMDetection's, which rolls and pads; only the attention in it is known."""

    def __init__(self, embed_dims, num_heads, window_size):
        super().__init__()
        self.w_msa = WindowMSA(embed_dims, num_heads, window_size)

    def forward(self, x):
        return self.w_msa(x)


BLOCKS = {
    "microsoft": partial(SwinTransformerBlock, 16, (12, 8), 2, 4),
    "microsoft_v2": partial(SwinTransformerBlockV2, 16, (8, 12), 2, 4),
}
CLASSES = {
    "microsoft": lambda **more: WindowAttention(16, (4, 4), 2, **more),
    "microsoft_v2": lambda **more: WindowAttentionV2(16, (4, 4), 2, **more),
    "video_swin": lambda **more: WindowAttention3D(16, (2, 3, 4), 2, **more),
    "mmdetection": lambda: WindowMSA(16, 2, (4, 3)),
}


def segment_mask(windows: int, slots: int) -> Tensor:
    """0 where two slots attend to each other, -100 where not; the first window is whole."""
    part = (torch.arange(slots)[None] * (torch.arange(windows)[:, None] > 0)) % 3
    return -100.0 * (part[:, :, None] != part[:, None])


# --- what tests do with them ---------------------------------------------------------------------


def fused_copy(model: nn.Module) -> nn.Module:
    fused = copy.deepcopy(model)
    assert fuse_window_attention(fused).fused
    return fused


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)


def close_gradients(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = (
        torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        for model in (one, other)
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=1e-3)


def step(model: nn.Module, x: Tensor, seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    model.zero_grad()
    out = first(model(x))
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).sin().view(out.shape))
    return out
