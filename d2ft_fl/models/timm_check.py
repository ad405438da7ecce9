"""Which of timm's models divide into heads that run by themselves, and what in others does not."""

from timm.layers import Attention, DropPath, LayerScale, Mlp, PatchEmbed, RmsNorm
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from d2ft_fl.errors import ConfigError

POOLS = ("token", "avg", "avgmax", "max")
NORMS = (nn.LayerNorm, RmsNorm)


def _is_off(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and module.p == 0)


# What in timm's other architectures does not divide into heads that run and train by themselves.
OTHERS = {
    "Eva": "rotates queries and keys by position (RoPE) and gates its feed-forward layers (SwiGLU)",
    "Beit": "adds a trained bias of relative positions to attention, and has none for keys",
    "VisionTransformerRelPos": "adds a trained bias of relative positions to attention",
    "VisionTransformerDistilled": "has two classifiers",
    "SwinTransformer": "attends within shifted windows, and has other heads in every stage",
    "SwinTransformerV2": "attends within shifted windows, and has other heads in every stage",
    "ConvNeXt": "consists of convolutions and has no attention heads",
    "ResNet": "consists of convolutions and has no attention heads",
    "EfficientNet": "consists of convolutions and has no attention heads",
    "MlpMixer": "mixes tokens by a layer of their own and has no attention heads",
}


def objection(model: nn.Module) -> str | None:
    """Return why this model does not decompose into subnets here, or None when it does."""
    if type(model) is not VisionTransformer:
        name = type(model).__name__
        return f"{name} {OTHERS.get(name, 'is an architecture of its own')}"
    if len(model.blocks) == 0:
        return "it has no blocks"
    if type(model.patch_embed) is not PatchEmbed:
        return f"it embeds images by {type(model.patch_embed).__name__}"
    if model.attn_pool is not None:
        return "it pools by attention"
    if model.global_pool not in POOLS:
        return f"it pools by {model.global_pool!r}"
    if not isinstance(model.head, nn.Linear):
        return "it has no classifier"
    if not _is_off(model.patch_drop):
        return "it drops patches at random, so that its work is not known beforehand"
    if not all(isinstance(norm, (nn.Identity, *NORMS)) for norm in (model.norm, model.fc_norm)):
        return f"its final norm is {type(model.norm).__name__}"
    for block in model.blocks:
        if type(block) is not Block:
            return f"its blocks are {type(block).__name__}"
        attn, mlp = block.attn, block.mlp
        if type(attn) is not Attention or type(mlp) is not Mlp:
            return f"its blocks use {type(attn).__name__} and {type(mlp).__name__}"
        norms = [block.norm1, block.norm2]
        norms += [n for n in (attn.q_norm, attn.k_norm) if not isinstance(n, nn.Identity)]
        if not all(isinstance(norm, NORMS) for norm in norms):
            return f"its norms are {type(norms[0]).__name__}"
        if not (isinstance(attn.norm, nn.Identity) and isinstance(mlp.norm, nn.Identity)):
            return "it norms across heads (scale_attn_norm, scale_mlp_norm)"
        if not all(isinstance(ls, (nn.Identity, LayerScale)) for ls in (block.ls1, block.ls2)):
            return f"it scales layers by {type(block.ls1).__name__}"
        if not all(
            isinstance(p, (nn.Identity, DropPath)) for p in (block.drop_path1, block.drop_path2)
        ):
            return f"it drops layers by {type(block.drop_path1).__name__}"
    return None


def check(model: nn.Module, name: str) -> VisionTransformer:
    """Return the model, once it is known to be a plain ViT.

    Raises:
        ConfigError: When it is not, with the reason, or its images are smaller than a patch.
    """
    if reason := objection(model):
        raise ConfigError(
            f"model {name!r} is not supported: {reason}; use a plain timm ViT (vit_* or deit*: "
            "pre-norm blocks of Attention and Mlp with LayerNorm or RmsNorm, with or without layer "
            "scale, registers, class token, q/k norms, attention gates, dropout and stochastic "
            f"depth, pooled by {', '.join(POOLS)})"
        )
    assert isinstance(model, VisionTransformer)
    (height, width), patch = model.patch_embed.img_size, model.patch_embed.patch_size
    if model.patch_embed.num_patches == 0:
        raise ConfigError(
            f"image-size = {min(height, width)} is less than a patch of model {name!r}, which has "
            f"{patch[0]} pixels a side; use {patch[0]} or more"
        )
    return model


def unseen(model: VisionTransformer) -> list[str]:
    """Return a line where a border of images is not seen, as they are no multiple of a patch."""
    (height, width), (side, _) = model.patch_embed.img_size, model.patch_embed.patch_size
    if not (left := max(height % side, width % side)):
        return []
    low = width - width % side
    return [
        f"images of {width} pixels are no multiple of the model's patches of {side}: a border of "
        f"{left} is not seen; image-size = {low} or {low + side} has none"
    ]
