"""The networks: a ViT conditioned on the noise level, and the projector of pre-training.

The trunk is written in plain torch. It has the layers and parameter names of timm's VisionTransformer, so weights move
between the two without renaming, and a test compares both bit by bit. The noise level enters as one more token.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from rrcm.models.stems import STEMS, hide_patches
from rrcm.utils.distributed import SyncBatchNorm1d

# Recompute activations larger than this in the backward pass instead of storing them.
RECOMPUTE_MIN_BYTES = 16 * 2**20
SIGMA_DATA = 0.5  # standard deviation of the data in model space (Karras et al. 2022)


def time_embedding(t: torch.Tensor, embed_dim: int) -> torch.Tensor:
    """Sinusoidal embedding of 250 ln(t): first cosines, then sines, with a maximum period of 10000.

    t (B,) > 0 in model space -> (B, embed_dim) float32. embed_dim must be even.
    """
    return sinusoidal_embedding(250 * t.float().log(), embed_dim)


def sinusoidal_embedding(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Cosines, then sines, of x (B,) times frequencies from 1 to 1/10000 -> (B, dim) float32. dim must be even."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=x.device) / half)
    angles = x[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v, each (B, heads, L, d) -> (B, heads, L, d).

    This uses torch's fused kernel, except in half precision on a CPU, where plain products take half the time in the
    forward pass and a fraction of it in the backward pass (benchmarks/README.md, "Attention").
    """
    if q.device.type == "cpu" and q.dtype != torch.float32:
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, embed_dim: int, num_heads: int, qkv_bias: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, L, D) -> (B, L, D)."""
        qkv = self.qkv(tokens).chunk(3, dim=-1)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in qkv)
        return self.proj(attention(q, k, v).transpose(1, 2).flatten(2))

    def forward_cls(self, tokens: torch.Tensor) -> torch.Tensor:
        """The first token of `forward`'s output: (B, L, D) -> (B, D).

        One query suffices. Since q (W_k x)^T = (q W_k) x^T, the query is projected once and no key is computed per
        token. Likewise W_v is applied once, to the attention-weighted mean of the tokens.
        """
        query, key, value = self.qkv.weight.unflatten(0, (3, self.num_heads, -1))  # (heads, d, D) each
        q = torch.einsum("bw,hdw->bhd", tokens[:, 0], query)
        if self.qkv.bias is not None:
            query_bias, _, value_bias = self.qkv.bias.unflatten(0, (3, self.num_heads, -1))
            q = q + query_bias  # the key bias shifts all scores equally, so softmax ignores it
        scores = torch.einsum("bhd,hdw->bhw", q, key) @ tokens.mT
        mean = (scores * q.shape[-1] ** -0.5).softmax(-1) @ tokens  # (B, heads, D)
        attended = torch.einsum("bhw,hdw->bhd", mean, value)
        if self.qkv.bias is not None:
            attended = attended + value_bias
        return self.proj(attended.flatten(1))


class Mlp(nn.Module):
    """Linear, GELU, linear. `Block` calls the layers individually."""

    def __init__(self, embed_dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, embed_dim)


class Block(nn.Module):
    """Pre-norm transformer block. `forward_cls` computes only the class token."""

    def __init__(self, embed_dim: int, num_heads: int, mlp_dim: int, qkv_bias: bool, norm_eps: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, norm_eps)
        self.attn = Attention(embed_dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(embed_dim, norm_eps)
        self.mlp = Mlp(embed_dim, mlp_dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, L, D) -> (B, L, D)."""
        return self._add_mlp(tokens + self.attn(self.norm1(tokens)))

    def forward_cls(self, tokens: torch.Tensor) -> torch.Tensor:
        """The first token of `forward`'s output: (B, L, D) -> (B, D)."""
        return self._add_mlp(tokens[:, 0] + self.attn.forward_cls(self.norm1(tokens)))

    def _add_mlp(self, tokens: torch.Tensor) -> torch.Tensor:
        """Residual branch of the MLP: (..., D) -> (..., D).

        No tensor of the network is larger than GELU's output. If it is large, the backward pass recomputes it, which
        saves a fifth of a step's memory and costs a few percent of its time.
        """
        hidden = self.mlp.fc1(self.norm2(tokens))
        num_bytes = hidden.numel() * hidden.element_size()  # torch.compile does not know `hidden.nbytes`
        recompute = hidden.requires_grad and num_bytes >= RECOMPUTE_MIN_BYTES
        return tokens + (checkpointed(self._mlp_out, hidden) if recompute else self._mlp_out(hidden))

    def _mlp_out(self, hidden: torch.Tensor) -> torch.Tensor:
        """Second half of the MLP: (..., mlp_dim) -> (..., D)."""
        return self.mlp.fc2(self.mlp.act(hidden))


class BlockOptions(NamedTuple):
    """Details of the transformer blocks. The defaults are the paper's."""

    mlp_dim: int | None = None  # None: 4 * embed_dim
    qkv_bias: bool = False
    norm_eps: float = 1e-5  # of all LayerNorms


class NoiseConditionedViT(nn.Module):
    """A pre-norm ViT with a time token between the class token and the patches.

    One learned position embedding covers all tokens. Weights start from torch's initialisation. With
    `grad_checkpointing` set, the backward pass recomputes each block.

    >>> encoder = rrcm.NoiseConditionedViT(image_size=8, channels=1, patch_size=4, embed_dim=32, depth=1, num_heads=2)
    >>> encoder(torch.randn(5, 1, 8, 8), t=1.0).shape
    torch.Size([5, 32])
    """

    summary_tokens: ClassVar[int] = 2  # class and time, which come before the tokens of patches

    def __init__(
        self,
        image_size: int = 224,
        channels: int = 3,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        block: BlockOptions = BlockOptions(),  # noqa: B008 (immutable)
        stem: str = "patches",  # a key of STEMS
    ):
        super().__init__()
        self.image_size, self.patch_size, self.num_patches = image_size, patch_size, (image_size // patch_size) ** 2
        self.embed_dim, self.in_chans, self.grad_checkpointing = embed_dim, channels, False
        self.stem, self.patch_embed = stem, STEMS[stem](image_size, patch_size, channels, embed_dim)
        num_tokens = self.summary_tokens + self.num_patches
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens, embed_dim))
        mlp_dim = block.mlp_dim or 4 * embed_dim
        blocks = (Block(embed_dim, num_heads, mlp_dim, block.qkv_bias, block.norm_eps) for _ in range(depth))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(embed_dim, block.norm_eps)
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def init_moco_v3(self) -> None:
        """Initialise as MoCo-v3 (Chen et al. 2021): Xavier-uniform linear layers, zero biases, uniform patch embedding.

        Query, key and value count as three matrices.
        """
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

    def forward(
        self, images: torch.Tensor, t: torch.Tensor | float, visible: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The representation of noisy images: (B, C, H, W) -> (B, embed_dim).

        images: float, model space (pixels scaled to [-1, 1], plus noise of standard deviation t).
        t: one noise level, or one per image (B,), in model space (2 * pixel sigma), > 0.
        visible: (B, V) int64, the patches of each image that the network sees. The result is then all tokens,
        (B, 2 + V, embed_dim): class, time, and these patches in their order. If the tokens of the stem depend on
        several patches, all other patches are set to zero.
        """
        if visible is not None and self.patch_embed.mixes_patches:
            images = hide_patches(images, visible, self.patch_embed.patch_size[0])
        tokens = self._embed(images, t)
        if visible is not None:
            kept = torch.cat([visible.new_tensor([[0, 1]]).expand(len(visible), -1), visible + 2], dim=1)
            tokens = tokens.gather(1, kept[:, :, None].expand(-1, -1, self.embed_dim))
            return self.norm(self._through(self.blocks, tokens))
        *blocks, last = self.blocks
        return self.norm(last.forward_cls(self._through(blocks, tokens)))  # the other tokens are not needed

    def patch_tokens(self, images: torch.Tensor, t: torch.Tensor | float) -> torch.Tensor:
        """The tokens of all patches: (B, C, H, W) -> (B, patches, embed_dim). images and t as in `forward`."""
        return self.norm(self._through(self.blocks, self._embed(images, t)))[:, 2:]

    def _embed(self, images: torch.Tensor, t: torch.Tensor | float) -> torch.Tensor:
        """The class token, the time token and the patches: (B, 2 + patches, D)."""
        t = torch.as_tensor(t, dtype=torch.float32, device=images.device).expand(images.shape[0])
        c_in = (t.square() + SIGMA_DATA**2).rsqrt()
        dtype, noise = self.patch_embed.proj.weight.dtype, time_embedding(t, self.embed_dim)
        patches = self.patch_embed((c_in[:, None, None, None] * images).to(dtype), noise.to(dtype))
        time_token = noise.to(patches.dtype)
        class_token = self.cls_token.expand(images.shape[0], -1, -1)
        return torch.cat([class_token.to(patches.dtype), time_token[:, None], patches], dim=1) + self.pos_embed

    def _through(self, blocks: Iterable[Block], tokens: torch.Tensor) -> torch.Tensor:
        for block in blocks:
            tokens = checkpointed(block, tokens) if self.grad_checkpointing else block(tokens)
        return tokens


def checkpointed(module: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """module(*inputs) with activation checkpointing: the backward pass recomputes the activations."""
    if not torch.is_grad_enabled():
        return module(*inputs)
    return checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False)


def forward_in_chunks(module: Callable[..., torch.Tensor], num_chunks: int, *inputs: torch.Tensor) -> torch.Tensor:
    """module(*inputs), computed for `num_chunks` slices of the inputs (B, ...) one after another -> (B, ...).

    The gradient is the same as for the whole batch. The backward pass recomputes each slice (GradCache, Gao et al.
    2021), so only one slice's activations are in memory at a time.
    """
    if num_chunks == 1:
        return module(*inputs)
    slices = zip(*(x.chunk(num_chunks) for x in inputs), strict=True)
    return torch.cat([checkpointed(module, *chunk) for chunk in slices])


def mlp_head(*sizes: int, last_norm: bool = False) -> nn.Sequential:
    """Linear-BN-ReLU for every size except the last, then Linear, without biases: (B, sizes[0]) -> (B, sizes[-1]).

    With `last_norm` a BatchNorm without weight and bias follows, as in MoCo-v3 (Chen et al. 2021).
    """
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes[:-1]):
        layers += [nn.Linear(before, after, bias=False), SyncBatchNorm1d(after), nn.ReLU(inplace=True)]
    layers += [nn.Linear(*sizes[-2:], bias=False)]
    return nn.Sequential(*layers, *([SyncBatchNorm1d(sizes[-1], affine=False)] if last_norm else []))


class EncoderWithProjector(nn.Module):
    """Encoder and projector: the networks of contrastive pre-training."""

    def __init__(self, encoder: nn.Module, hidden: int, out: int, last_norm: bool = False):
        super().__init__()
        self.encoder = encoder
        self.projector = mlp_head(encoder.embed_dim, hidden, hidden, out, last_norm=last_norm)

    def forward(
        self,
        batches: Sequence[torch.Tensor],
        levels: Sequence[float | torch.Tensor],
        num_projected: int,
        num_chunks: int = 1,
    ) -> list[torch.Tensor]:
        """Encode several batches in one pass (or in `num_chunks`) and project the first `num_projected` of them.

        batches: each (B, C, H, W), model space. levels: for each batch one noise level, or one per image (B,).
        Returns one tensor per batch: projections (B, out) of the first `num_projected` batches, and representations
        (B, embed_dim) of the others. BatchNorm normalises each projected batch separately.
        """
        size, device = len(batches[0]), batches[0].device
        t = [torch.as_tensor(level, dtype=torch.float32, device=device).expand(size) for level in levels]
        together = forward_in_chunks(self.encoder, num_chunks, torch.cat(list(batches)), torch.cat(t))
        representations = together.split(size)
        return [self.projector(r) for r in representations[:num_projected]] + list(representations[num_projected:])


def block_multiply_adds(num_tokens: int, embed_dim: int) -> int:
    """Multiply-adds of one image in a `Block` with an MLP of 4 * embed_dim."""
    return 12 * num_tokens * embed_dim**2 + 2 * num_tokens**2 * embed_dim


def encoder_multiply_adds(
    stem: int, num_patches: int, embed_dim: int, depth: int, num_heads: int, num_visible: int | None = None
) -> int:
    """Multiply-adds of one image in a `NoiseConditionedViT` whose stem takes `stem` of them.

    The last block computes only the class token, which is the representation. With `num_visible` patches, every block
    computes all remaining tokens.
    """
    if num_visible is not None:
        return stem + depth * block_multiply_adds(2 + num_visible, embed_dim)
    last = 12 * embed_dim**2 + 2 * num_heads * (2 + num_patches) * embed_dim
    return stem + (depth - 1) * block_multiply_adds(2 + num_patches, embed_dim) + last


def parameter_count(module: nn.Module) -> int:
    """The number of parameters, including frozen ones."""
    return sum(parameter.numel() for parameter in module.parameters())
