"""The adapter for timm's plain vision transformers.

With ``timm_build`` and ``timm_family`` it is all that knows timm, but for benchmarks.

A block is attention with a fused product in, ``qkv``, and a feed-forward layer, each with a norm
before it; gated attention, norms of queries and keys, and layer scale are known.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from timm.layers import (
    Attention,
    DropPath,
    LayerScale,
    Mlp,
    RmsNorm,
    patch_dropout_forward,
)
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from d2ft_fl.engine.attention import fused_attention
from d2ft_fl.engine.model_adapter import BlockTraits, BranchTraits, Context, Middle, Norm
from d2ft_fl.subnets.architecture import Architecture, Kind, Parameter
from d2ft_fl.subnets.branches import BranchKind, BranchSpec
from d2ft_fl.util.strict_json import write_json

# A block's parameters, by the role the engine knows them under.
SLICED_ON_OUTPUT = ("fc1.weight", "fc1.bias")
ROLES = {
    "attn.gate.weight": "gate.weight",
    "attn.gate.bias": "gate.bias",
    "attn.q_norm.weight": "q_norm.weight",
    "attn.q_norm.bias": "q_norm.bias",
    "attn.k_norm.weight": "k_norm.weight",
    "attn.k_norm.bias": "k_norm.bias",
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
    if role in ("proj.weight", "gate.weight", "gate.bias"):
        rows = tuple(tuple(range(head * width, (head + 1) * width)) for head in range(heads))
        return make(Kind.SLICED, axis=1 if role == "proj.weight" else 0, rows=rows)
    if role in (*SLICED_ON_OUTPUT, "fc2.weight"):
        rows = tuple(map(tuple, _split(mlp.fc1.out_features, heads)))
        return make(Kind.SLICED, axis=0 if role in SLICED_ON_OUTPUT else 1, rows=rows)
    return make(Kind.SHARED)


@dataclass(frozen=True, eq=False)
class TimmViT:
    """The adapter of one plain vision transformer; see :class:`~.model_adapter.ModelAdapter`.

    Attributes:
        model: A model that :func:`check` has passed.
        arguments: The keyword arguments of ``timm.create_model`` that build it, for its export.
        notes: What was done to weights so that they fit, a line each.
    """

    model: VisionTransformer
    arguments: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width in pixels of the images that the model takes."""
        patches: Any = self.model.patch_embed
        height, width = patches.img_size
        return int(patches.proj.in_channels), int(height), int(width)

    def describe(self) -> Architecture:
        """Return how the model divides into subnets."""
        return _describe(self.model, self.input_shape)

    def block_traits(self, device: torch.device) -> list[BlockTraits]:
        """Return what each block computes with, from the first to the last."""
        blocks: Any = self.model.blocks
        return [_block_traits(block, device) for block in blocks]

    def without_blocks(self) -> VisionTransformer:
        """Return a copy of the embedding and the head alone; final parameters want gradients."""
        blocks, self.model.blocks = self.model.blocks, nn.Sequential()
        try:
            outer = copy.deepcopy(self.model)
        finally:
            self.model.blocks = blocks
        for name, parameter in outer.named_parameters():
            parameter.requires_grad_(name.startswith(FINAL_MODULES))
        return outer

    def embed(self, outer: Any, inputs: Tensor, tokens: int | None) -> tuple[Tensor, Context]:
        """Return images [examples, channels, height, width] as tokens [examples, tokens, dim].

        Args:
            outer: See :meth:`without_blocks`.
            inputs: The images.
            tokens: How many to keep of each image, prefix tokens included, the rest drawn; None
                for all.
        """
        x = outer._pos_embed(outer.patch_embed(inputs))
        patches, prefix = x.shape[1] - outer.num_prefix_tokens, outer.num_prefix_tokens
        if tokens is not None and tokens < x.shape[1]:
            # It keeps int(patches * (1 - prob)): half a patch more does away with rounding.
            prob = 1 - (tokens - prefix + 0.5) / patches
            x, _ = patch_dropout_forward(x, prob, prefix, ordered=True, training=True)
        return outer.norm_pre(x), {}

    def features(self, outer: Any, x: Tensor, context: Context) -> Tensor:
        """Return tokens [examples, tokens, dim] normed and pooled: [examples, dim]."""
        return outer.forward_head(outer.norm(x), pre_logits=True)

    def logits(self, outer: Any, features: Tensor) -> Tensor:
        """Return what the classifier makes of features [examples, dim]: [examples, classes]."""
        return outer.head(features)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits of timm's own model."""
        return self.model(inputs)

    def export(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write ``model.safetensors``, and ``model.json``: how ``timm.create_model`` builds it."""
        safetensors.torch.save_file(
            {n: t.contiguous() for n, t in weights.items()}, folder / "model.safetensors"
        )
        (folder / "model.json").write_text(write_json(dict(self.arguments), indent=2) + "\n")


def _describe(model: VisionTransformer, input_shape: tuple[int, int, int]) -> Architecture:
    parameters = []
    for name, tensor in model.named_parameters():
        shape = tuple(tensor.shape)
        if name.startswith("blocks."):
            parameters.append(_block_parameter(model, name, shape))
        elif name.startswith(FINAL_MODULES):
            parameters.append(Parameter(name, shape, Kind.FINAL))
        else:
            parameters.append(Parameter(name, shape, Kind.EMBEDDING, trains=False))
    blocks: Any = model.blocks
    block = blocks[0]
    attn = block.attn
    patches = model.patch_embed.num_patches
    return Architecture(
        blocks=len(blocks),
        heads=attn.num_heads,
        dim=model.embed_dim,
        tokens=patches + model.num_prefix_tokens,
        prefix=model.num_prefix_tokens,
        classes=model.num_classes,
        branches=_branches(block, {p.role for p in parameters}),
        classifier="head",
        rms=isinstance(block.norm1, RmsNorm),
        output_dropout=float(attn.proj_drop.p),
        drop_path=max(_drop_path(b.drop_path1) for b in blocks),
        # A convolution is one product of [patches, kernel] by [kernel, dim].
        embed_flops=2 * patches * model.patch_embed.proj.weight.numel(),
        input_elements=math.prod(input_shape),
        norm_pooled=isinstance(model.norm, nn.Identity),
        parameters=tuple(parameters),
    )


def _branches(block: Any, roles: set[str]) -> tuple[BranchSpec, BranchSpec]:
    """Return what the blocks consist of, by the first of them and the roles that there are."""
    attn, mlp = block.attn, block.mlp
    gated = getattr(attn, "gate", None) is not None
    norms = tuple(role for role in ROLES.values() if role.startswith(("q_norm.", "k_norm.")))
    attention = BranchSpec(
        kind=BranchKind.ATTENTION,
        norm="norm1",
        inward=("qkv", "gate") if gated else ("qkv",),
        outward="proj",
        widths=(attn.head_dim,) * attn.num_heads,
        middle=tuple(role for role in norms if role in roles),
        scale="ls1.gamma" if isinstance(block.ls1, LayerScale) else "",
        gated=gated,
        head_norms=sum(not isinstance(n, nn.Identity) for n in (attn.q_norm, attn.k_norm)),
        dropout=float(attn.attn_drop.p),
    )
    feed_forward = BranchSpec(
        kind=BranchKind.FEED_FORWARD,
        norm="norm2",
        inward=("fc1",),
        outward="fc2",
        widths=tuple(map(len, _split(mlp.fc1.out_features, attn.num_heads))),
        scale="ls2.gamma" if isinstance(block.ls2, LayerScale) else "",
        dropout=float(mlp.drop1.p),
    )
    return attention, feed_forward


def _block_traits(block: Any, device: torch.device) -> BlockTraits:
    """Return the traits of attention and feed-forward layer."""
    return (
        BranchTraits(
            norm=_norm(block.norm1),
            middle=_attention(block.attn, device),
            output_dropout=block.attn.proj_drop.p,
            drop_path=_drop_path(block.drop_path1),
        ),
        BranchTraits(
            norm=_norm(block.norm2),
            middle=_feed_forward(block.mlp),
            output_dropout=block.mlp.drop2.p,
            drop_path=_drop_path(block.drop_path2),
        ),
    )


def _drop_path(module: nn.Module) -> float:
    return float(module.drop_prob or 0.0) if isinstance(module, DropPath) else 0.0


def _norm(module: Any) -> Norm:
    """Return a norm as a function of its input and parameters, without weights of its own."""
    if isinstance(module, nn.LayerNorm):
        shape, epsilon = list(module.normalized_shape), module.eps
        return lambda x, p: F.layer_norm(x, shape, p.get("weight"), p.get("bias"), epsilon)
    shape, epsilon = list(module.normalized_shape), module.eps
    return lambda x, p: F.rms_norm(x, shape, p.get("weight"), epsilon)


def _attention(attn: Attention, device: torch.device) -> Middle:
    width, dropout = attn.head_dim, float(attn.attn_drop.p)
    norms = [None if isinstance(n, nn.Identity) else _norm(n) for n in (attn.q_norm, attn.k_norm)]
    gated = getattr(attn, "gate", None) is not None
    plain = not fused_attention(device.type, width, 0.0)

    def middle(
        training: bool, hs: Sequence[Tensor], shared: Mapping[str, Tensor], context: Context
    ) -> Tensor:
        qkv = hs[0]  # [examples, tokens, heads * 3 * width]
        examples, tokens, _ = qkv.shape
        split = qkv.view(examples, tokens, -1, 3, width).permute(3, 0, 2, 1, 4)
        q, k, v = split.unbind(0)  # each [examples, heads, tokens, width]
        if norms[0] is not None:
            q = norms[0](q, _under(shared, "q_norm."))
        if norms[1] is not None:
            k = norms[1](k, _under(shared, "k_norm."))
        with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout if training else 0.0)
        out = out.transpose(1, 2).reshape(examples, tokens, -1)  # [.., heads * width]
        return out * hs[1].sigmoid() if gated else out

    return middle


def _feed_forward(mlp: Mlp) -> Middle:
    # Not the module itself: its hooks, a counter's say, would hold on to what it is given.
    act, dropout = mlp.act.forward, float(mlp.drop1.p)

    def middle(
        training: bool, hs: Sequence[Tensor], shared: Mapping[str, Tensor], context: Context
    ) -> Tensor:
        if training and dropout:
            return F.dropout(act(hs[0]), dropout)
        return act(hs[0])  # [examples, tokens, hidden]

    return middle


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
