"""The tiny autoencoder of FLUX.2. diffusers has no class for it.

It is diffusers' AutoencoderTiny, whose blocks at the lowest resolution also see statistics of the whole image. The
names of the weights are those of the published file (https://huggingface.co/madebyollin/taef2), and the results are
those of the published code (https://github.com/madebyollin/taesd).
"""

from __future__ import annotations

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock, DecoderTiny, EncoderTiny
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

WIDTH = 64
"""Channels of all blocks."""
BLOCKS = (1, 3, 3, 3)
"""Blocks of the encoder's stages, from the highest resolution to the lowest. The decoder has the reverse."""
GROUPS = 4
"""Groups of the normalization, and the factor of its channels."""


class PooledBlock(AutoencoderTinyBlock):  # type: ignore[misc]  # diffusers has no types
    """A residual block whose input is changed by statistics of the whole image."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH, "relu")
        wide = WIDTH * GROUPS
        self.pool = nn.Sequential(
            nn.Conv2d(WIDTH, wide, 1, bias=False),
            nn.GroupNorm(GROUPS, wide),
            nn.ReLU(inplace=True),
            nn.Conv2d(wide, WIDTH, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = super().forward(x + self.pool(x))
        return result


class TinyFlux2Autoencoder(ModelMixin, ConfigMixin):  # type: ignore[misc]  # their base classes have no types
    """The autoencoder. It has no tiles, because each tile would have statistics of its own."""

    use_tiling = False

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, latent_channels: int = 32) -> None:
        super().__init__()
        self.encoder = EncoderTiny(
            in_channels=3,
            out_channels=latent_channels,
            num_blocks=BLOCKS,
            block_out_channels=(WIDTH,) * len(BLOCKS),
            act_fn="relu",
        )
        self.decoder = DecoderTiny(
            in_channels=latent_channels,
            out_channels=3,
            num_blocks=BLOCKS[::-1],
            block_out_channels=(WIDTH,) * len(BLOCKS),
            upsampling_scaling_factor=2,
            act_fn="relu",
            upsample_fn="nearest",
        )
        for index in range(BLOCKS[-1]):  # before the encoder's last layer, after the decoder's first two
            self.encoder.layers[-2 - index] = PooledBlock()
            self.decoder.layers[2 + index] = PooledBlock()

    def encode(self, pixels: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """Encode pixels [B, 3, H, W] in [-1, 1] to scaled latents [B, C, H/8, W/8], which FLUX.2 patchifies."""
        return (self.encoder(pixels),)

    def decode(self, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """Decode scaled latents [B, C, h, w] to pixels [B, 3, 8 * h, 8 * w], about in [-1, 1]."""
        return (self.decoder(latents),)
