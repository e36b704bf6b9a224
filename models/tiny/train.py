"""Train `tiny`, the small AutoencoderKL that ships with this repository, on images found inside PyPI packages.

    make train-tiny

The file has the order of the work: images, batches, model, train, evaluate, save. The convolutions run in bfloat16,
which a CPU with AMX multiplies five times as fast as float32.
"""

import argparse
import bz2
import math
import time
from pathlib import Path
from zipfile import ZipFile

import matplotlib
import numpy as np
import skimage
import sklearn
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn import functional as F

SKIMAGE = Path(skimage.__file__).parent / "data"
SKLEARN = Path(sklearn.__file__).parent / "datasets/images"
MATPLOTLIB = Path(matplotlib.get_data_path())

# Photographs in the wheels of packages: public domain, CC0 or "no known copyright restrictions".
TRAINING = [
    *(SKIMAGE / f"{name}.png" for name in ("brick", "camera", "cell", "chelsea", "coins")),
    *(SKIMAGE / f"{name}.png" for name in ("grass", "gravel", "ihc", "moon", "page")),
    *(SKIMAGE / f"{name}.jpg" for name in ("hubble_deep_field", "retina")),
    MATPLOTLIB / "sample_data/grace_hopper.jpg",
]
# One more photograph in the public domain, a raccoon, is in the wheels of scipy before 1.11.
SCIPY = "scipy-1.9.3-cp310-cp310-manylinux_2_17_x86_64.manylinux2014_x86_64.whl"
# A photograph that shows the progress of a training, and is not part of it.
VALIDATION = SKIMAGE / "rocket.jpg"
# Photographs for the evaluation. China and flower are CC-BY, and motorcycle states no license.
HELD_OUT = [SKIMAGE / f"{name}.png" for name in ("astronaut", "coffee", "motorcycle_left")]
HELD_OUT += [SKLEARN / f"{name}.jpg" for name in ("china", "flower")]

WIDTHS = (16, 32, 96)  # channels at full size, at half of it, ...
LATENT_CHANNELS = 8
SHRINK = 2 ** (len(WIDTHS) - 1)
STEPS = 14000
DECAY = 12750  # the last steps, in which the learning rate falls to 0
ROUNDED = 8000  # from this step on, norms are rounded to bfloat16
CROPS, SIDE = 16, 64
ANCHOR = 100.0  # far above the activations, which are about 1
POSTERIOR_DEVIATION = 0.02  # of every latent; the deviation of latents is about 1 or more

Pyramid = list[Tensor]
Images = list[tuple[float, list[Pyramid]]]


# --- images -----------------------------------------------------------------------------------------------------------


def load(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB")


def raccoon(wheel: Path) -> Image.Image:
    pixels = bz2.decompress(ZipFile(wheel).read("scipy/misc/face.dat"))
    return Image.fromarray(np.frombuffer(pixels, np.uint8).reshape(768, 1024, 3))


def noise(rng: np.random.Generator, size: int = 512) -> Image.Image:
    """Return colored noise whose amplitude falls as 1/frequency**a, as in photographs."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    frequency[0, 0] = 1 / size
    spectrum = frequency ** -rng.uniform(0.6, 1.8) * np.exp(2j * np.pi * rng.random((3, *frequency.shape)))
    planes = np.fft.irfft2(spectrum, s=(size, size))
    planes /= planes.std()
    # One plane is the luminance of the three channels; the others tint it.
    planes = planes[:1] * rng.normal(1, 0.15, (3, 1, 1)) + planes * rng.uniform(0.1, 0.5)
    pixels = planes * rng.uniform(15, 60) + rng.uniform(70, 180, (3, 1, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def collage(rng: np.random.Generator, photos: list[Image.Image], size: int = 512) -> Image.Image:
    """Draw overlapping discs, polygons, lines and words with sharp edges, filled with colors, noise and `photos`."""
    canvas = noise(rng, size)
    fills = [noise(rng, size), *(photos[i].resize((size, size)) for i in rng.choice(len(photos), 3, replace=False))]
    fonts = [str(MATPLOTLIB / "fonts/ttf" / f"DejaVu{face}.ttf") for face in ("Sans", "Serif-Bold", "SansMono")]
    for _ in range(150):
        # The stencil is supersampled, because PIL does not smooth edges.
        stencil = Image.new("L", (2 * size, 2 * size))
        draw = ImageDraw.Draw(stencil)
        radius, (x, y) = 8 * 20 ** rng.random() ** 1.3, rng.uniform(0, 2 * size, 2)
        match rng.integers(4):
            case 0:
                draw.ellipse((x - radius, y - radius * rng.uniform(0.3, 1), x + radius, y + radius), fill=255)
            case 1:
                angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 8)))
                draw.polygon([(x + radius * np.cos(a), y + radius * np.sin(a)) for a in angles], fill=255)
            case 2:
                draw.line((x, y, *rng.uniform(0, 2 * size, 2)), fill=255, width=int(rng.integers(2, 14)))
            case 3:
                word = "".join(chr(code) for code in rng.integers(33, 127, rng.integers(4, 30)))
                font = ImageFont.truetype(str(rng.choice(fonts)), rng.uniform(16, 90))
                draw.text((x - size / 4, y), word, fill=255, font=font)
        color = tuple(int(level) for level in (rng.uniform(0, 255) + rng.normal(0, 35, 3)).clip(0, 255))
        canvas.paste(color if rng.random() < 0.5 else fills[rng.integers(4)], (0, 0), stencil.reduce(2))
    return canvas


def pyramid(image: Image.Image) -> Pyramid:
    """Return the image at several sizes: uint8 [3, H, W] each, with a shorter side of at least 160 pixels."""
    sizes = [(round(image.width * scale), round(image.height * scale)) for scale in (1.3, 1, 0.7, 0.5, 0.35)]
    resized = [np.array(image.resize(size, Image.Resampling.LANCZOS)) for size in sizes if min(size) >= 160]
    return [torch.from_numpy(pixels).permute(2, 0, 1).contiguous() for pixels in resized]


def training_images(rng: np.random.Generator, wheel: Path) -> Images:
    """Return color photographs, gray photographs and generated images, each kind with its share of the crops."""
    photos = [*map(load, TRAINING), raccoon(wheel)]
    generated = [collage(rng, photos) for _ in range(100)] + [noise(rng) for _ in range(20)]
    gray = [np.ptp(np.asarray(photo), axis=2).max() == 0 for photo in photos]
    kinds = {
        0.55: [photo for photo, plain in zip(photos, gray, strict=True) if not plain],
        0.2: [photo for photo, plain in zip(photos, gray, strict=True) if plain],
        0.25: generated,
    }
    return [(often, [pyramid(image) for image in images]) for often, images in kinds.items()]


# --- batches ----------------------------------------------------------------------------------------------------------


def crop(rng: np.random.Generator, images: Images, size: int) -> Tensor:
    """Return a random square of a random image, rotated, mirrored, sometimes with swapped channels: uint8 [3, H, W]."""
    pyramids = images[rng.choice(len(images), p=[often for often, _ in images])][1]
    levels = pyramids[rng.integers(len(pyramids))]
    image = levels[rng.integers(len(levels))]
    y, x = (rng.integers(side - size + 1) for side in image.shape[1:])
    square = image[:, y : y + size, x : x + size]
    square = torch.rot90(square, int(rng.integers(4)), (1, 2))
    if rng.random() < 0.5:
        square = square.flip(2)
    return square[torch.from_numpy(rng.permutation(3))] if rng.random() < 0.2 else square


def batch(rng: np.random.Generator, images: Images, count: int, size: int) -> Tensor:
    """Return crops in random light: float32 [count, 3, size, size] in [-1, 1]."""

    def uniform(low: float, high: float, channels: int = 1) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, (count, channels, 1, 1))).float()

    pixels = torch.stack([crop(rng, images, size) for _ in range(count)]).float() / 127.5 - 1
    gray = pixels.mean(1, keepdim=True)
    pixels = gray + (pixels - gray) * uniform(0.5, 1.5)
    gain, offset = uniform(0.6, 1.3) * uniform(0.9, 1.1, 3), uniform(-0.2, 0.2) + uniform(-0.1, 0.1, 3)
    return (pixels * gain + offset).clamp(-1, 1)


# --- model ------------------------------------------------------------------------------------------------------------


def build() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(WIDTHS),
        up_block_types=("UpDecoderBlock2D",) * len(WIDTHS),
        block_out_channels=WIDTHS,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        sample_size=512,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


@torch.no_grad()
def anchor(vae: AutoencoderKL) -> None:
    """Keep channel 0 of every layer at a large constant, so that group normalization divides by a constant.

    The statistics of a GroupNorm depend on the content and the size of the image. A network that is trained on small
    crops then fails on whole photographs. Here the constant dominates the statistics for every image.
    """

    def pin(parameter: nn.Parameter, index: int | tuple[slice, int], value: float = 0) -> None:
        parameter[index] = value
        if parameter.grad is not None:
            parameter.grad[index] = 0

    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d) and not name.endswith("conv_out"):
            pin(module.weight, 0)
            pin(
                module.bias, 0, 0 if name.endswith("conv2") else ANCHOR
            )  # conv2 adds to a stream that has its own anchor
            if not name.endswith("conv_in"):
                pin(module.weight, (slice(None), 0))
        elif isinstance(module, nn.GroupNorm):
            pin(module.weight, 0)
            pin(module.bias, 0)


@torch.no_grad()
def round_norms(vae: AutoencoderKL) -> list[tuple[nn.Parameter, Tensor]]:
    """Round the parameters of the norms to bfloat16, and return each parameter with its value before.

    Because of the anchor they are large numbers that nearly cancel, so rounding shifts whole channels. The other layers
    learn to compensate.
    """
    norms = (module for module in vae.modules() if isinstance(module, nn.GroupNorm))
    exact = [(parameter, parameter.clone()) for norm in norms for parameter in norm.parameters()]
    for parameter, value in exact:
        parameter.copy_(value.bfloat16())
    return exact


@torch.no_grad()
def initialize(vae: AutoencoderKL, pixels: Tensor) -> None:
    """Initialize the layers to the best linear transform of `pixels`, [B, 3, H, W] in [-1, 1], that they can express.

    The encoder halves the image several times and keeps the principal components of 2x2 squares. The decoder undoes
    each step by linear regression. Training then begins above 20 dB.
    """
    for name, module in vae.named_modules():
        if isinstance(module, nn.GroupNorm):  # with the anchor's mean and deviation, this is the identity
            count = module.num_channels
            module.weight.fill_(ANCHOR * (count - 1) ** 0.5 / count)
            module.bias.fill_(ANCHOR / count)
        elif isinstance(module, nn.Conv2d):
            module.bias.zero_()
            if name.endswith("conv2"):
                module.weight.zero_()  # every residual branch starts at zero
            elif not name.endswith("conv1"):
                module.weight.zero_()
                module.weight[:, :, *(side // 2 for side in module.kernel_size)] = torch.eye(*module.weight.shape[:2])
    conv_in, conv_out = vae.encoder.conv_in, vae.decoder.conv_out
    conv_in.weight.zero_()
    conv_in.weight[1:4, :, 1, 1] = torch.eye(3)

    # The last convolutions follow a SiLU, so they get each value and its negative: x = SiLU(x) - SiLU(-x).
    levels = [pixels]
    for block in vae.encoder.down_blocks[:-1]:
        conv, last = block.downsamplers[0].conv, len(levels) == len(WIDTHS) - 1
        squares = F.pixel_unshuffle(levels[-1], 2)
        rows = squares.movedim(1, -1).flatten(0, -2)
        kept = LATENT_CHANNELS if last else min(conv.out_channels - 1, rows.shape[1])
        components = torch.linalg.eigh(rows.T @ rows).eigenvectors.flip(1)[:, :kept].T / 2
        rows = torch.cat([components, -components]) if last else components
        conv.weight.zero_()
        conv.weight[1 : len(rows) + 1, 1 : levels[-1].shape[1] + 1, :2, :2] = rows.unflatten(1, (-1, 2, 2))
        levels.append(F.conv2d(squares, components[:, :, None, None]))
    deviation = levels[-1].std((0, 2, 3))
    scale = torch.diag(1 / deviation)
    vae.encoder.conv_out.weight.zero_()
    vae.encoder.conv_out.weight[:LATENT_CHANNELS, 1 : 2 * LATENT_CHANNELS + 1, 1, 1] = torch.cat([scale, -scale], 1)
    vae.encoder.conv_out.bias[LATENT_CHANNELS:] = 2 * math.log(POSTERIOR_DEVIATION)  # it has no gradient

    vae.decoder.conv_in.weight.zero_()
    vae.decoder.conv_in.weight[1 : LATENT_CHANNELS + 1, :, 1, 1] = torch.diag(deviation)
    features = levels.pop()
    for block in vae.decoder.up_blocks[:-1]:
        conv, target = block.upsamplers[0].conv, levels.pop()
        features = F.interpolate(features, scale_factor=2.0, mode="nearest")
        columns = F.unfold(features, 3, padding=1).movedim(1, -1).flatten(0, 1).double()
        wanted = target.movedim(1, -1).flatten(0, -2).double()
        ridge = 1e-6 * len(columns) * torch.eye(columns.shape[1])
        kernel = torch.linalg.solve(columns.T @ columns + ridge, columns.T @ wanted).T.float()
        kernel = kernel.unflatten(1, (-1, 3, 3))
        features = F.conv2d(features, kernel, padding=1)
        kernel = kernel if levels else torch.cat([kernel, -kernel])
        conv.weight.zero_()
        conv.weight[1 : len(kernel) + 1, 1 : kernel.shape[1] + 1] = kernel
    conv_out.weight.zero_()
    conv_out.weight[:, 1:7, 1, 1] = torch.cat([torch.eye(3), -torch.eye(3)], 1)
    anchor(vae)


# --- train ------------------------------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum with an orthogonal update of each kernel, as a matrix [out, in * 3 * 3] (Newton-Schulz).

    All directions of a kernel learn at one speed. It needs several times fewer steps than Adam
    (https://kellerjordan.github.io).
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(average, group["momentum"]).flatten(1)
                update = (update / (update.norm() + 1e-7)).bfloat16()
                for _ in range(5):
                    gram = update @ update.T
                    update = 3.4445 * update + (-4.7750 * gram + 2.0315 * gram @ gram) @ update
                parameter.sub_(update.view_as(parameter), alpha=group["lr"])


def train(vae: AutoencoderKL, rng: np.random.Generator, images: Images, checkpoint: Path) -> float:
    """Minimize the root mean square error of each crop, so that hard textures do not outweigh the other crops.

    Training continues from `checkpoint` if that exists, to the same result. Return the seconds of the training.
    """
    kernels = [parameter for parameter in vae.parameters() if parameter.ndim == 4]
    vectors = [parameter for parameter in vae.parameters() if parameter.ndim == 1]
    optimizers = [Muon(kernels, lr=0.006), torch.optim.Adam(vectors, lr=2e-3, betas=(0.9, 0.99))]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 100, 1, (STEPS - step) / DECAY))
        for optimizer in optimizers
    ]
    modules, first, spent = [vae, *optimizers, *schedules], 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=False)
        first, spent, rng.bit_generator.state = state["step"], state["seconds"], state["numpy"]
        torch.set_rng_state(state["torch"])
        for module, values in zip(modules, state["modules"], strict=True):
            module.load_state_dict(values)
    began, watched, average = time.monotonic() - spent, held_out(VALIDATION), None
    vae.to(memory_format=torch.channels_last)
    for step in range(first, STEPS):
        pixels = batch(rng, images, CROPS, SIDE).to(vae.device, memory_format=torch.channels_last)
        exact = round_norms(vae) if step >= ROUNDED else []
        with torch.autocast(vae.device.type, torch.bfloat16):
            latents = vae.encoder(pixels)[:, :LATENT_CHANNELS]
            latents = latents + POSTERIOR_DEVIATION * torch.randn(latents.shape).to(latents)
            decoded = vae.decoder(latents).float()
        error = (decoded - pixels).square().mean((1, 2, 3))
        loss = (error + 1e-5).sqrt().mean()
        vae.zero_grad()
        loss.backward()
        for parameter, value in exact:
            parameter.data.copy_(value)
        anchor(vae)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        decibel = float(10 * torch.log10(4 / error.detach()).mean())
        average = decibel if average is None else 0.98 * average + 0.02 * decibel
        if (step + 1) % 250 == 0:
            seconds = time.monotonic() - began
            state = {"step": step + 1, "seconds": seconds, "numpy": rng.bit_generator.state}
            state |= {"torch": torch.get_rng_state(), "modules": [module.state_dict() for module in modules]}
            torch.save(state, checkpoint)
            quality = f"{average:.2f} dB, {VALIDATION.name} {psnr(vae, watched):.2f} dB"
            print(f"{step + 1} steps, {seconds / 60:.1f} minutes: {quality}", flush=True)
    return time.monotonic() - began


# --- evaluate ---------------------------------------------------------------------------------------------------------


def held_out(path: Path, size: int = 512) -> Tensor:
    """Return the center square of a photograph, resized: float32 [1, 3, size, size] in [-1, 1]."""
    image = load(path)
    side = min(image.size)
    x, y = (image.width - side) // 2, (image.height - side) // 2
    square = image.resize((size, size), Image.Resampling.LANCZOS, (x, y, x + side, y + side))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)[None].float() / 127.5 - 1


def decibels(before: Tensor, after: Tensor) -> float:
    """Return the PSNR in dB of two images in [-1, 1], rounded to 8 bits."""
    before, after = (((image.float().clamp(-1, 1) + 1) * 127.5).round() for image in (before, after))
    return float(10 * torch.log10(255**2 / (before - after).square().mean()))


@torch.no_grad()
def psnr(vae: AutoencoderKL, pixels: Tensor) -> float:
    """Return the PSNR in dB of `pixels`, [1, 3, H, W], after `vae` has encoded and decoded them in its dtype."""
    latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
    return decibels(pixels, vae.decode(latents).sample.cpu())


def principal_components(pixels: Tensor) -> float:
    """Return the PSNR in dB of the best linear transform of `pixels` to as many values, for comparison."""
    squares = F.pixel_unshuffle(pixels, SHRINK)
    rows = squares.movedim(1, -1).flatten(0, -2).double()
    centred = rows - rows.mean(0)
    components = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -LATENT_CHANNELS:]
    kept = centred @ components @ components.T + rows.mean(0)
    return decibels(pixels, F.pixel_shuffle(kept.float().view_as(squares.movedim(1, -1)).movedim(-1, 1), SHRINK))


@torch.no_grad()
def measure_scaling(vae: AutoencoderKL, rng: np.random.Generator, images: Images) -> None:
    """Set the config so that `(latents - shift_factor) * scaling_factor` has mean 0 and deviation 1 in training."""
    latents = vae.encode(batch(rng, images, 64, 128).to(vae.device)).latent_dist.mode()
    vae.register_to_config(
        shift_factor=round(float(latents.mean()), 4), scaling_factor=round(1 / float(latents.std()), 4)
    )


# --- save -------------------------------------------------------------------------------------------------------------

README = """\
---
license: apache-2.0
library_name: diffusers
---
# tiny

A small `AutoencoderKL` ({parameters:.1f} M parameters, {channels} latent channels, {shrink} times smaller on each side)
that is part of this repository, so the service runs and is tested without a download. It is not meant for generating
images.

    make train-tiny

trained it, in {steps} steps and {minutes:.0f} minutes on {device}. It learned from random
crops of images in the wheels of scikit-image, matplotlib and scipy 1.9 (public domain, CC0 or without known copyright
restrictions):

> {training}

and from collages of these with noise, shapes and words.

The table has the PSNR in dB of photographs outside the training, at 512x512 pixels. For comparison it has {channels}
principal components of each square of {shrink}x{shrink} pixels, fitted to that photograph:

| photograph | float32 | float16 | bfloat16 | principal components |
|---|---|---|---|---|
{table}

`shift_factor` and `scaling_factor` bring its latents to about mean 0 and deviation 1. One channel of every layer is a
large constant, which makes group normalization independent of the image's size and content. bfloat16 has the exact
parameters of its norms.
"""


def evaluate(folder: Path) -> dict[str, list[float]]:
    """Return for each photograph the PSNR in float32, float16 and bfloat16, and that of its principal components."""
    vaes = [
        AutoencoderKL.from_pretrained(folder, torch_dtype=dtype)
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    ]
    photographs = {path.name: held_out(path) for path in HELD_OUT}
    return {
        name: [*(psnr(vae, pixels) for vae in vaes), principal_components(pixels)]
        for name, pixels in photographs.items()
    }


def describe(vae: AutoencoderKL, scores: dict[str, list[float]], seconds: float) -> str:
    return README.format(
        parameters=vae.num_parameters() / 1e6,
        channels=LATENT_CHANNELS,
        shrink=SHRINK,
        steps=STEPS,
        minutes=seconds / 60,
        device=f"{torch.get_num_threads()} core of {processor()}",
        training=", ".join([*(path.name for path in TRAINING), "scipy.misc.face"]),
        table="\n".join(f"| {name} | {' | '.join(f'{value:.2f}' for value in row)} |" for name, row in scores.items()),
    )


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the VAE in models/tiny.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder of the result")
    parser.add_argument(
        "--wheel", type=Path, default=Path("out") / SCIPY, help="wheel of scipy 1.9, for one photograph"
    )
    parser.add_argument(
        "--checkpoint", type=Path, default=Path("out/tiny.pt"), help="file from which an interrupted training continues"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the training")
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    torch.set_flush_denormal(True)
    rng = np.random.default_rng(arguments.seed)
    images = training_images(rng, arguments.wheel)
    vae = build()
    initialize(vae, batch(rng, images, 256, 64))
    seconds = train(vae, rng, images, arguments.checkpoint)

    round_norms(vae)
    measure_scaling(vae, rng, images)
    vae.half().save_pretrained(arguments.output)
    scores = evaluate(arguments.output)
    for name, row in scores.items():
        print(f"{name:24}", *(f"{value:6.2f}" for value in row), "dB")
    (arguments.output / "README.md").write_text(describe(vae, scores, seconds))
    arguments.checkpoint.unlink()


if __name__ == "__main__":
    main()
