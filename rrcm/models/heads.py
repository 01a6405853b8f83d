"""Heads that pre-training puts on the encoder besides the projector: a predictor and a decoder of masked patches."""

import torch
from torch import nn

from rrcm.models.encoders import Encoder
from rrcm.models.vit import Block, EncoderWithProjector, forward_in_chunks, mlp_head


class EncoderWithPredictor(EncoderWithProjector):
    """The student of MoCo-v3 (Chen et al. 2021), which predicts the teacher's projection from its own."""

    def __init__(self, network: EncoderWithProjector, hidden: int, out: int):
        nn.Module.__init__(self)
        self.encoder, self.projector = network.encoder, network.projector
        self.predictor = mlp_head(out, hidden, out, last_norm=True)

    def forward(self, *inputs: object, num_projected: int, num_chunks: int = 1) -> list[torch.Tensor]:
        """As `EncoderWithProjector.forward`, with predictions in place of projections."""
        outputs = super().forward(*inputs, num_projected=num_projected, num_chunks=num_chunks)
        return [self.predictor(z) for z in outputs[:num_projected]] + outputs[num_projected:]


class Decoder(nn.Module):
    """Reconstructs all patches from the tokens of the visible ones (He et al. 2022): a light ViT.

    The decoder also sees the encoder's other tokens, such as class and time, and a learned mask token in place of each
    hidden patch. The class token, which fine-tuning uses, therefore learns about the image.
    """

    def __init__(self, encoder: Encoder, embed_dim: int, depth: int, num_heads: int):
        super().__init__()
        self.summary_tokens, self.num_patches = encoder.summary_tokens, encoder.num_patches
        num_tokens = self.summary_tokens + self.num_patches
        patch_dim = encoder.in_chans * encoder.patch_size**2
        self.embed = nn.Linear(encoder.embed_dim, embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens, embed_dim))
        block = embed_dim, num_heads, 4 * embed_dim, False, 1e-5
        self.blocks = nn.Sequential(*(Block(*block) for _ in range(depth)))
        self.norm = nn.LayerNorm(embed_dim, 1e-5)
        self.head = nn.Linear(embed_dim, patch_dim)
        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, tokens: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Reconstruct all patches: the encoder's tokens (B, S + V, D) -> (B, P, patch_dim).

        `visible` (B, V) int64 names the patches of the last V tokens. An encoder without tokens for patches gives only
        the first S tokens.
        """
        summary, seen = self.embed(tokens).split([self.summary_tokens, tokens.shape[1] - self.summary_tokens], dim=1)
        batch, num_seen, embed_dim = seen.shape
        hidden = self.mask_token.to(seen.dtype).expand(batch, self.num_patches, -1)
        patches = hidden.scatter(1, visible[:, :num_seen, None].expand(-1, -1, embed_dim), seen)
        decoded = self.blocks(torch.cat([summary, patches], dim=1) + self.pos_embed)
        return self.head(self.norm(decoded[:, self.summary_tokens :]))


class MaskedAutoencoder(nn.Module):
    """Encoder and decoder: the networks of DMAE."""

    def __init__(self, encoder: Encoder, decoder: Decoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(
        self, noisy: torch.Tensor, t: torch.Tensor, *, visible: torch.Tensor, num_chunks: int = 1
    ) -> torch.Tensor:
        """Noisy images (B, C, H, W), t (B,) and patches `visible` (B, V) -> all patches (B, P, patch_dim)."""
        return forward_in_chunks(self._reconstruct, num_chunks, noisy, t, visible)

    def _reconstruct(self, noisy: torch.Tensor, t: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(noisy, t, visible), visible)


class ProjectedAutoencoder(EncoderWithProjector, MaskedAutoencoder):
    """Projector and decoder on one encoder. It reconstructs when called with `visible`, and projects otherwise."""

    def __init__(self, network: EncoderWithProjector, decoder: Decoder):
        nn.Module.__init__(self)
        self.encoder, self.projector, self.decoder = network.encoder, network.projector, decoder

    def forward(self, *inputs: object, visible: torch.Tensor | None = None, **options: int) -> object:
        """As `EncoderWithProjector.forward`, or with `visible` as `MaskedAutoencoder.forward`."""
        if visible is None:
            return EncoderWithProjector.forward(self, *inputs, **options)
        return MaskedAutoencoder.forward(self, *inputs, visible=visible, **options)
