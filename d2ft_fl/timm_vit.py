"""The adapter for timm's plain vision transformers: the only code that knows timm's names.

It says how a model divides into subnets (:func:`describe`), and runs the parts that do not
divide: the embedding before the blocks and the classifier after them.
"""

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

from timm.layers import Attention, LayerNorm, LayerScale, Mlp, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from d2ft_fl.errors import ConfigError
from d2ft_fl.subnets import Architecture, Kind, Parameter

# A block's parameters, by the role the engine knows them under.
SLICED_ON_OUTPUT = ("fc1.weight", "fc1.bias")
ROLES = {
    "attn.qkv.weight": "qkv.weight",
    "attn.qkv.bias": "qkv.bias",
    "attn.proj.weight": "proj.weight",
    "attn.proj.bias": "proj.bias",
    "mlp.fc1.weight": "fc1.weight",
    "mlp.fc1.bias": "fc1.bias",
    "mlp.fc2.weight": "fc2.weight",
    "mlp.fc2.bias": "fc2.bias",
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "ls1.gamma": "ls1.gamma",
    "ls2.gamma": "ls2.gamma",
}
FINAL_MODULES = ("norm.", "fc_norm.", "head.")


def _is_off(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and module.p == 0)


def _objection(model: nn.Module) -> str | None:
    """Why this model does not decompose into subnets here, or None when it does."""
    if type(model) is not VisionTransformer:
        return f"it is a {type(model).__name__}"
    if len(model.blocks) == 0 or model.patch_embed.num_patches == 0:
        return "it has no blocks or no patches"
    if type(model.patch_embed) is not PatchEmbed:
        return f"it embeds images by {type(model.patch_embed).__name__}"
    if model.attn_pool is not None:
        return "it pools by attention"
    if model.global_pool not in ("token", "avg") or not isinstance(model.head, nn.Linear):
        return f"it pools by {model.global_pool!r}"
    if (model.global_pool == "avg") != isinstance(model.fc_norm, nn.LayerNorm):
        return "its final norm is not where its pooling wants it"
    if not (_is_off(model.pos_drop) and _is_off(model.patch_drop) and _is_off(model.head_drop)):
        return "it drops tokens or features at random"
    for block in model.blocks:
        if type(block) is not Block:
            return f"its blocks are {type(block).__name__}"
        attn, mlp = block.attn, block.mlp
        if type(attn) is not Attention or type(mlp) is not Mlp:
            return f"its blocks use {type(attn).__name__} and {type(mlp).__name__}"
        if not (isinstance(block.norm1, LayerNorm) and isinstance(block.norm2, LayerNorm)):
            return f"its norms are {type(block.norm1).__name__}"
        if not all(isinstance(ls, (nn.Identity, LayerScale)) for ls in (block.ls1, block.ls2)):
            return f"it scales layers by {type(block.ls1).__name__}"
        if not (isinstance(attn.q_norm, nn.Identity) and isinstance(attn.norm, nn.Identity)):
            return "it norms queries, keys or attention outputs"
        if attn.gate is not None or not isinstance(mlp.norm, nn.Identity):
            return "it gates attention or norms inside its feed-forward layer"
        drops = (attn.attn_drop, attn.proj_drop, mlp.drop1, mlp.drop2)
        paths = (block.drop_path1, block.drop_path2)
        if not all(map(_is_off, drops + paths)):
            return "it uses dropout or stochastic depth"
    return None


def check(model: nn.Module, name: str) -> VisionTransformer:
    """The model, once it is known to be a plain ViT.

    Raises:
        ConfigError: When it is not, with the reason.
    """
    if reason := _objection(model):
        raise ConfigError(
            f"model {name!r} is not supported: {reason}; use a plain timm ViT "
            "(vit_* or deit_* with LayerNorm, GELU feed-forward and class-token or average pooling)"
        )
    assert isinstance(model, VisionTransformer)
    return model


def _split(width: int, heads: int) -> list[range]:
    """Cut ``width`` feed-forward units into one run a head, as evenly as possible."""
    base, extra = divmod(width, heads)
    starts = [head * base + min(head, extra) for head in range(heads + 1)]
    return [range(starts[head], starts[head + 1]) for head in range(heads)]


def _block_parameter(model: VisionTransformer, name: str, shape: tuple[int, ...]) -> Parameter:
    _, index, rest = name.split(".", 2)
    role = ROLES[rest]
    block: Any = model.blocks[int(index)]
    attn, mlp = block.attn, block.mlp
    heads, width = attn.num_heads, attn.head_dim
    make = partial(Parameter, name, shape, role=role, block=int(index))
    if role.startswith("qkv"):
        parts = [range(part * heads * width, (part + 1) * heads * width) for part in range(3)]
        rows = tuple(
            tuple(row for part in parts for row in part[head * width : (head + 1) * width])
            for head in range(heads)
        )
        return make(Kind.SLICED, axis=0, rows=rows)
    if role == "proj.weight":
        rows = tuple(tuple(range(head * width, (head + 1) * width)) for head in range(heads))
        return make(Kind.SLICED, axis=1, rows=rows)
    if role in (*SLICED_ON_OUTPUT, "fc2.weight"):
        rows = tuple(map(tuple, _split(mlp.fc1.out_features, heads)))
        return make(Kind.SLICED, axis=0 if role in SLICED_ON_OUTPUT else 1, rows=rows)
    return make(Kind.SHARED)


def describe(model: VisionTransformer) -> Architecture:
    """How a checked model divides into subnets."""
    parameters = []
    for name, tensor in model.named_parameters():
        shape = tuple(tensor.shape)
        if name.startswith("blocks."):
            parameters.append(_block_parameter(model, name, shape))
        elif name.startswith(FINAL_MODULES):
            parameters.append(Parameter(name, shape, Kind.FINAL))
        else:
            parameters.append(Parameter(name, shape, Kind.EMBEDDING))
    block: Any = model.blocks[0]
    attn, mlp = block.attn, block.mlp
    patches = model.patch_embed.num_patches
    return Architecture(
        blocks=len(model.blocks),
        heads=attn.num_heads,
        dim=model.embed_dim,
        head_dim=attn.head_dim,
        hidden=tuple(len(run) for run in _split(mlp.fc1.out_features, attn.num_heads)),
        tokens=patches + model.num_prefix_tokens,
        classes=model.num_classes,
        layer_scale=isinstance(block.ls1, LayerScale),
        # A convolution is one product of [patches, kernel] by [kernel, dim].
        embed_flops=2 * patches * model.patch_embed.proj.weight.numel(),
        input_elements=input_shape(model)[0] * input_shape(model)[1] ** 2,
        pooled=model.global_pool == "avg",
        parameters=tuple(parameters),
    )


@dataclass(frozen=True)
class BlockTraits:
    """What a block computes with beside its weights."""

    activation: nn.Module
    epsilon1: float  # of the norm before attention
    epsilon2: float  # of the norm before the feed-forward layer


def block_traits(model: VisionTransformer) -> list[BlockTraits]:
    """The traits of every block, in order."""
    blocks: Any = model.blocks
    return [BlockTraits(b.mlp.act, b.norm1.eps, b.norm2.eps) for b in blocks]


def without_blocks(model: VisionTransformer) -> VisionTransformer:
    """A copy of the embedding and the classifier alone; final parameters want gradients."""
    blocks, model.blocks = model.blocks, nn.Sequential()
    try:
        outer = copy.deepcopy(model)
    finally:
        model.blocks = blocks
    for name, parameter in outer.named_parameters():
        parameter.requires_grad_(name.startswith(FINAL_MODULES))
    return outer


def input_shape(model: VisionTransformer) -> tuple[int, int]:
    """(channels, side in pixels) of the images that a model takes."""
    return model.patch_embed.proj.in_channels, int(model.patch_embed.img_size[0])


def embed(model: VisionTransformer, images: Tensor) -> Tensor:
    """Images [batch, channels, height, width] to tokens [batch, tokens, dim]."""
    return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))


def classify(model: VisionTransformer, x: Tensor) -> Tensor:
    """Tokens [batch, tokens, dim] to logits [batch, classes]."""
    return model.forward_head(model.norm(x))
