"""The networks: a ViT that is told the noise level, its projector for pre-training, its head for classification."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.models import vision_transformer
from torch import nn
from torch.utils.checkpoint import checkpoint

from rrcm import config
from rrcm.utils.distributed import SyncBatchNorm1d

RECOMPUTE_MIN_BYTES = 16 * 2**20  # bytes of an activation that are worth computing it again
SIGMA_DATA = 0.5  # standard deviation of the data in model space, as Karras et al. 2022 set it


def time_embedding(t: torch.Tensor, embed_dim: int) -> torch.Tensor:
    """Sinusoids of 250 ln(t): cosines, then sines, max period 10000. t (B,) in model space -> (B, width) float32."""
    half = embed_dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = 250 * t.float().log()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v, each (B, heads, L, d) -> (B, heads, L, d).

    By torch's fused kernel, but not in half precision on a CPU: there plain products take half the time forward and a
    fraction of it backward (benchmarks/README.md).
    """
    if q.device.type == "cpu" and q.dtype != torch.float32:
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Block(vision_transformer.Block):
    """timm's pre-norm block; the same layers, but attention by `attention`, and on request for the class token alone."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, L, D) -> (B, L, D)."""
        qkv = self.attn.qkv(self.norm1(tokens)).chunk(3, dim=-1)
        q, k, v = (x.unflatten(-1, (self.attn.num_heads, -1)).transpose(1, 2) for x in qkv)
        return self._update(tokens, attention(q, k, v).transpose(1, 2).flatten(2))

    def class_token(self, tokens: torch.Tensor) -> torch.Tensor:
        """The first token of what `forward` gives: (B, L, D) -> (B, D).

        Nothing reads the other tokens of the last block, so it has one query, and q (W x)^T = (q W) x^T: bringing the
        query to the tokens costs less than a key for each of them. Likewise one value, of the attended mean of tokens.
        """
        num_heads, normed = self.attn.num_heads, self.norm1(tokens)
        query, key, value = self.attn.qkv.weight.unflatten(0, (3, num_heads, -1))  # (heads, d, D) each
        q = torch.einsum("bw,hdw->bhd", normed[:, 0], query)
        if self.attn.qkv.bias is not None:
            query_bias, _, value_bias = self.attn.qkv.bias.unflatten(
                0, (3, num_heads, -1)
            )  # the keys' adds to all alike
            q = q + query_bias
        scores = torch.einsum("bhd,hdw->bhw", q, key) @ normed.mT
        mean = (scores * q.shape[-1] ** -0.5).softmax(-1) @ normed  # (B, heads, D)
        attended = torch.einsum("bhw,hdw->bhd", mean, value)
        if self.attn.qkv.bias is not None:
            attended = attended + value_bias
        return self._update(tokens[:, 0], attended.flatten(1))

    def _update(self, tokens: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Tokens (..., D) after attention, whose heads' answers are `attended` (..., D), and after the MLP."""
        tokens = tokens + self.attn.proj(attended)
        hidden = self.mlp.fc1(self.norm2(tokens))
        large = (
            hidden.requires_grad and hidden.numel() * hidden.element_size() >= RECOMPUTE_MIN_BYTES
        )  # nbytes does not compile
        return tokens + (checkpointed(self._mlp_out, hidden) if large else self._mlp_out(hidden))

    def _mlp_out(self, hidden: torch.Tensor) -> torch.Tensor:
        """The second half of the MLP: (..., 4 D) -> (..., D). Where GELU's output, as large as any tensor here, is
        large, it is not kept for the backward pass: a fifth of a step's memory for a few hundredths of its time."""
        return self.mlp.fc2(self.mlp.act(hidden))


class NoiseConditionedViT(vision_transformer.VisionTransformer):
    """timm's ViT with a time token between the class token and the patches; one position embedding over all of them.

    Pre-norm blocks, GELU. By default LayerNorm eps 1e-5, no qkv bias and an MLP of 4 * width, as in the paper; other
    people's ViTs differ there. Layers keep torch's own initialisation (`init="torch"`) or take MoCo-v3's
    (`init="moco_v3"`, Chen et al. 2021).
    """

    def __init__(
        self,
        image_size: int = 224,
        channels: int = 3,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        init: str = "torch",
        freeze_patch_embed: bool = False,
        grad_checkpointing: bool = False,
        mlp_dim: int | None = None,  # None: 4 * width
        qkv_bias: bool = False,
        norm_eps: float = 1e-5,
    ):
        super().__init__(
            img_size=image_size,
            patch_size=patch_size,
            in_chans=channels,
            num_classes=0,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=4 if mlp_dim is None else (mlp_dim + 0.5) / embed_dim,  # timm rounds the product down
            qkv_bias=qkv_bias,
            reg_tokens=1,  # reserves the time token's place in the position embedding
            norm_layer=partial(nn.LayerNorm, eps=norm_eps),
            block_fn=Block,
            weight_init="skip",
        )
        del self.reg_token
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if init == "moco_v3":
            self.init_moco_v3()
        self.patch_embed.requires_grad_(not freeze_patch_embed)
        self.grad_checkpointing = grad_checkpointing

    def init_moco_v3(self) -> None:
        """Xavier-uniform layers with zero biases, q, k and v as three matrices, uniform patch embedding."""
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear):
                fan_out = layer.out_features // 3 if name.endswith("qkv") else layer.out_features
                bound = math.sqrt(6 / (fan_out + layer.in_features))
                nn.init.uniform_(layer.weight, -bound, bound)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        bound = math.sqrt(6 / (3 * math.prod(self.patch_embed.patch_size) + self.embed_dim))
        nn.init.uniform_(self.patch_embed.proj.weight, -bound, bound)
        nn.init.zeros_(self.patch_embed.proj.bias)

    def forward(self, images: torch.Tensor, t: torch.Tensor | float) -> torch.Tensor:
        """Representation of noisy images.

        images (B, C, H, W) float in model space (pixels scaled to [-1, 1], plus noise of standard deviation t);
        t: one noise level or one per image (B,), model space (2 * pixel sigma), > 0 -> (B, width).
        """
        t = torch.as_tensor(t, dtype=torch.float32, device=images.device).expand(len(images))
        c_in = (t.square() + SIGMA_DATA**2).rsqrt()
        patches = self.patch_embed((c_in[:, None, None, None] * images).to(self.patch_embed.proj.weight.dtype))
        time_token = time_embedding(t, self.embed_dim).to(patches.dtype)
        class_token = self.cls_token.expand(len(images), -1, -1).to(patches.dtype)
        tokens = torch.cat([class_token, time_token[:, None], patches], dim=1) + self.pos_embed
        *blocks, last = self.blocks
        for block in blocks:
            tokens = checkpointed(block, tokens) if self.grad_checkpointing else block(tokens)
        return self.norm(last.class_token(tokens))


def checkpointed(module: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """module(*inputs), whose insides are not kept for the backward pass but computed once more there."""
    if not torch.is_grad_enabled():
        return module(*inputs)
    return checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False)


def forward_in_chunks(module: Callable[..., torch.Tensor], num_chunks: int, *inputs: torch.Tensor) -> torch.Tensor:
    """module(*inputs) of `num_chunks` slices of the inputs (B, ...) one after the other, -> (B, ...).

    Gradients are those of the whole: the backward pass computes each slice once more (GradCache, Gao et al. 2021), so
    that memory is needed for the insides of one slice alone.
    """
    if num_chunks == 1:
        return module(*inputs)
    slices = zip(*(x.chunk(num_chunks) for x in inputs), strict=True)
    return torch.cat([checkpointed(module, *some) for some in slices])


def projector(embed_dim: int, hidden: int, out: int) -> nn.Sequential:
    """Linear-BN-ReLU, Linear-BN-ReLU, Linear, no biases, no last BatchNorm: (B, width) -> (B, out)."""
    return nn.Sequential(
        nn.Linear(embed_dim, hidden, bias=False),
        SyncBatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, hidden, bias=False),
        SyncBatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, out, bias=False),
    )


class EncoderWithProjector(nn.Module):
    """The network of pre-training: encoder and projector."""

    def __init__(self, encoder: NoiseConditionedViT, hidden: int, out: int):
        super().__init__()
        self.encoder = encoder
        self.projector = projector(encoder.embed_dim, hidden, out)

    def forward(
        self, batches: Sequence[torch.Tensor], levels: Sequence[float | torch.Tensor], project: int, num_chunks: int = 1
    ) -> list[torch.Tensor]:
        """One encoder pass, or one in `num_chunks`, over several batches (each (B, C, H, W), model space), batch i at noise
        level levels[i] (one, or one an image (B,)).

        Returns a tensor a batch: projections (B, out) of the first `project` batches, each seen by BatchNorm as a
        batch of its own, and representations (B, width) of the rest.
        """
        size, device = len(batches[0]), batches[0].device
        t = [torch.as_tensor(level, dtype=torch.float32, device=device).expand(size) for level in levels]
        representations = forward_in_chunks(self.encoder, num_chunks, torch.cat(list(batches)), torch.cat(t)).split(
            size
        )
        return [self.projector(r) for r in representations[:project]] + list(representations[project:])


def build_encoder(model: config.Model, data: config.Data) -> NoiseConditionedViT:
    """The encoder that the settings describe."""
    return NoiseConditionedViT(
        image_size=data.image_size,
        channels=data.channels,
        patch_size=model.patch_size,
        embed_dim=model.embed_dim,
        depth=model.depth,
        num_heads=model.num_heads,
        init=model.init,
        freeze_patch_embed=model.freeze_patch_embed,
        grad_checkpointing=model.grad_checkpointing,
    )


def parameter_count(module: nn.Module) -> int:
    """Number of parameters, frozen ones included."""
    return sum(parameter.numel() for parameter in module.parameters())
