"""Train the small ViT and the small ResNet that moonshot ships, on pictures of letters and digits.

    python benchmarks/train_demo_vision.py moonshot/demo

writes `vit/` and `resnet/` (weights in float16, processor) and `images/` (train.parquet to calibrate on, test.parquet)
into the folder given. Every picture is a fresh random draw, so training sees none twice: glyph, font, size, position,
rotation, shear, colours, shading, noise, and a rectangle that may hide a part. The test set is another random draw
in the same fonts, those that come with matplotlib.
"""

import argparse
import math
import string
import time
from pathlib import Path

import datasets
import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

CLASSES = string.digits + string.ascii_uppercase
FONTS = [
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmr10", "cmb10", "cmss10", "cmtt10", "cmti10"),
]
SIZE = 32  # of a picture
CANVAS = 64  # of a glyph before it is placed
TEST, CALIBRATION = 2000, 512


def glyphs() -> Tensor:
    """Every class in every font, (classes, fonts, CANVAS, CANVAS) from 0 to 1, centred, capitals 40 pixels high."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    drawn = np.zeros((len(CLASSES), len(FONTS), CANVAS, CANVAS), np.float32)
    for f, name in enumerate(FONTS):
        path = str(folder / f"{name}.ttf")
        _, top, _, bottom = ImageFont.truetype(path, 100).getbbox("H")
        font = ImageFont.truetype(path, round(40 * 100 / (bottom - top)))
        for c, text in enumerate(CLASSES):
            left, top, right, bottom = font.getbbox(text)
            picture = Image.new("L", (CANVAS, CANVAS))
            corner = ((CANVAS - left - right) / 2, (CANVAS - top - bottom) / 2)
            ImageDraw.Draw(picture).text(corner, text, fill=255, font=font)
            drawn[c, f] = np.asarray(picture, np.float32) / 255
    return torch.from_numpy(drawn)


class Pictures:
    """Random pictures, the same ones for the same seed."""

    def __init__(self, glyphs: Tensor, seed: int):
        self.glyphs, self.generator = glyphs, torch.Generator().manual_seed(seed)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """(pictures (count, 3, SIZE, SIZE) of bytes, labels (count,)); 16 levels a colour, so that they compress."""
        labels = torch.randint(len(CLASSES), (count,), generator=self.generator)
        fonts = torch.randint(len(FONTS), (count,), generator=self.generator)
        glyph = self._placed(self.glyphs[labels, fonts][:, None])
        ink, paper = self._colours(count)
        picture = self._occluded(paper + self._shading(count) + glyph * (ink - paper))
        noise = torch.randn(picture.shape, generator=self.generator)
        picture = picture + self._uniform(count, 0, 0.04) * noise
        return (picture.clamp(0, 1) * 15).round().mul(17).byte(), labels

    def _uniform(self, count: int, low: float, high: float, channels: int = 1) -> Tensor:
        return low + (high - low) * torch.rand((count, channels, 1, 1), generator=self.generator)

    def _placed(self, glyph: Tensor) -> Tensor:
        """Glyphs (count, 1, CANVAS, CANVAS) turned, sheared, scaled, moved, and reduced to SIZE."""
        count = len(glyph)
        angle = self._uniform(count, -10, 10).flatten() * (math.pi / 180)
        shear = self._uniform(count, -0.15, 0.15).flatten()
        scale = self._uniform(count, 0.85, 1.2).flatten()
        stretch = self._uniform(count, 0.9, 1.1).flatten()
        shift = self._uniform(count, -0.12, 0.12, 2)[..., 0]
        cos, sin = angle.cos(), angle.sin()
        turn = torch.stack((cos, -sin, sin, cos), 1).reshape(count, 2, 2)
        zero, one = torch.zeros(count), torch.ones(count)
        form = torch.stack((stretch, shear, zero, one), 1).reshape(count, 2, 2) * scale[:, None, None]
        inverse = torch.linalg.inv(turn @ form)
        grid = F.affine_grid(torch.cat((inverse, -inverse @ shift), 2), list(glyph.shape), align_corners=False)
        return F.avg_pool2d(F.grid_sample(glyph, grid, align_corners=False), CANVAS // SIZE)

    def _colours(self, count: int) -> tuple[Tensor, Tensor]:
        """Of ink and paper: one dark and one light, either way round, the contrast between them random."""
        dark, light = self._uniform(count, 0, 0.4, 3), self._uniform(count, 0.6, 1, 3)
        contrast = self._uniform(count, 0.5, 1)
        dark, light = (0.5 + contrast * (colour - 0.5) for colour in (dark, light))
        swapped = self._uniform(count, 0, 1) < 0.5
        return torch.where(swapped, light, dark), torch.where(swapped, dark, light)

    def _shading(self, count: int) -> Tensor:
        ramp = torch.linspace(-1, 1, SIZE)
        slopes = self._uniform(count, -0.15, 0.15, 2)
        return slopes[:, :1] * ramp + slopes[:, 1:] * ramp[:, None]

    def _occluded(self, picture: Tensor) -> Tensor:
        """With a rectangle in a random colour over every second picture, up to a quarter of it high and wide."""
        count = len(picture)
        place, extent = self._uniform(count, 0, SIZE, 2), self._uniform(count, 2, SIZE / 4, 2)
        near = (torch.arange(SIZE) - place[:, :1]).abs() < extent[:, :1] / 2
        across = (torch.arange(SIZE)[:, None] - place[:, 1:]).abs() < extent[:, 1:] / 2
        hidden = near & across & (self._uniform(count, 0, 1) < 0.5)
        return torch.where(hidden, self._uniform(count, 0, 1, 3), picture)


def pixel_values(pictures: Tensor) -> Tensor:
    """What the processor makes of them: bytes to -1 ... 1."""
    return pictures.float() / 127.5 - 1


def labels_of_the_model() -> dict[str, dict]:
    names = dict(enumerate(CLASSES))
    return {"id2label": names, "label2id": {name: label for label, name in names.items()}}


def vit() -> nn.Module:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=512,
            image_size=SIZE,
            patch_size=8,
            initializer_range=0.08,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **labels_of_the_model(),
        )
    )


def resnet() -> nn.Module:
    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=32,
            hidden_sizes=[64, 128, 256],
            depths=[2, 2, 2],
            layer_type="bottleneck",
            **labels_of_the_model(),
        )
    )


@torch.no_grad()
def accuracy(model: nn.Module, pictures: Tensor, labels: Tensor) -> float:
    model.eval()
    found = torch.cat([model(pixel_values(part)).logits.argmax(1) for part in pictures.split(250)])
    return float((found == labels).float().mean())


def train(
    model: nn.Module, drawn: Tensor, rate: float, steps: int, batch: int, test: tuple[Tensor, Tensor]
) -> None:
    pictures = Pictures(drawn, seed=0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.1)
    start = time.time()
    for step in range(steps):
        model.train()
        images, labels = pictures.draw(batch)
        loss = model(pixel_values(images), labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 250 == 0 or step == steps - 1:
            found = 100 * accuracy(model, *test)
            print(f"{step:5d} {loss:.3f} test {found:.2f} % {time.time() - start:.0f} s", flush=True)


def write_images(pictures: Tensor, labels: Tensor, path: Path) -> None:
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(CLASSES)))
    images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures]
    datasets.Dataset.from_dict({"image": images, "label": labels.tolist()}, features).to_parquet(path)


MODELS = {"resnet": (resnet, 4e-3, 3000), "vit": (vit, 1.5e-3, 10000)}  # how it is built, learning rate, steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    drawn = glyphs()
    test = Pictures(drawn, seed=1).draw(TEST)
    (arguments.folder / "images").mkdir(parents=True, exist_ok=True)
    write_images(*test, arguments.folder / "images" / "test.parquet")
    write_images(*Pictures(drawn, seed=2).draw(CALIBRATION), arguments.folder / "images" / "train.parquet")

    processor = ViTImageProcessorPil(size={"height": SIZE, "width": SIZE})
    for name in arguments.models:
        torch.manual_seed(arguments.seed)
        build, rate, steps = MODELS[name]
        model = build()
        print(f"{name}: {sum(p.numel() for p in model.parameters())} parameters")
        train(model, drawn, rate, steps, arguments.batch, test)
        model.to(torch.float16).save_pretrained(arguments.folder / name)
        processor.save_pretrained(arguments.folder / name)
        print(f"in float16: test {100 * accuracy(model.float(), *test):.2f} %")


if __name__ == "__main__":
    main()
