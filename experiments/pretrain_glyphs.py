"""Pretrain the bundled vision transformer on synthetic glyphs.

    python experiments/pretrain_glyphs.py --output d2ft_fl/assets/vit_glyphs.json

Letters of the free fonts that Matplotlib ships (DejaVu, STIX, Computer Modern) are rendered once,
then bent, sheared and scaled on the fly and reduced to 8 x 8 counts of black pixels the way the
UCI handwritten digits were made (Alpaydin & Kaynak 1998: 32 x 32 bitmaps, counted in 4 x 4 cells).
No digit is seen, printed or handwritten. The classifier is dropped; what is left, rounded to
float16, is the default job's starting point. Fixed seed, fixed thread count: the same machine
writes the same file.
"""

import argparse
import string
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from d2ft_fl.models.timm_build import GLYPH_VIT
from d2ft_fl.models.weights import save_weights_json

CLASSES = string.ascii_letters
FONTS = (
    "DejaVuSans*.ttf",
    "DejaVuSerif*.ttf",
    "STIXGeneral*.ttf",
    "cmr10.ttf",
    "cmss10.ttf",
    "cmtt10.ttf",
    "cmb10.ttf",
)
CANVAS = 64  # pixels of a rendered glyph's side, before it is bent
CELLS = 8  # cells of a counted glyph's side, as in the digits
STROKES = (0, 1)  # pixels added around a glyph of 64 pixels


def render(font: Path, character: str, stroke: int) -> np.ndarray:
    """Draw one glyph, black on nothing, scaled to fill the canvas: [CANVAS, CANVAS] in 0..1."""
    face = ImageFont.truetype(str(font), CANVAS)
    left, top, right, bottom = face.getbbox(character, stroke_width=stroke)
    width, height = int(right - left), int(bottom - top)
    glyph = Image.new("L", (width, height), 0)
    ImageDraw.Draw(glyph).text((-left, -top), character, font=face, fill=255, stroke_width=stroke)
    # The UCI bitmaps fill their height; width follows, up to the square.
    scaled = glyph.resize((max(6, min(CANVAS, round(width * CANVAS / height))), CANVAS))
    canvas = Image.new("L", (CANVAS, CANVAS), 0)
    canvas.paste(scaled, ((CANVAS - scaled.width) // 2, 0))
    return np.asarray(canvas, dtype=np.float32) / 255


def render_bank() -> tuple[torch.Tensor, torch.Tensor]:
    """All glyphs of all fonts: images [n, 1, CANVAS, CANVAS], labels [n]."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = sorted({path for pattern in FONTS for path in folder.glob(pattern)})
    fonts = [font for font in fonts if "Display" not in font.name]  # DejaVu's maths-only faces
    images, labels = [], []
    for font in fonts:
        for label, character in enumerate(CLASSES):
            for stroke in STROKES:
                images.append(render(font, character, stroke))
                labels.append(label)
    return torch.from_numpy(np.stack(images))[:, None], torch.tensor(labels)


def bend(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Distort each glyph at random and count it: [n, 1, CANVAS, CANVAS] -> [n, 1, 8, 8] in 0..1."""
    n = len(images)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    angle, shear = uniform(-0.3, 0.3), uniform(-0.35, 0.35)
    wide, high = uniform(1.1, 1.9), uniform(0.95, 1.15)
    cos, sin = angle.cos(), angle.sin()
    affine = torch.stack(
        [
            torch.stack([wide * cos, wide * (sin + shear), uniform(-0.12, 0.12)], dim=1),
            torch.stack([-high * sin, high * cos, uniform(-0.08, 0.08)], dim=1),
        ],
        dim=1,
    )  # [n, 2, 3]
    grid = F.affine_grid(affine, [n, 1, 32, 32], align_corners=False)  # [n, 32, 32, 2]
    waves = torch.randn(n, 2, 4, 4, generator=generator) * 0.1
    waves = F.interpolate(waves, size=(32, 32), mode="bicubic", align_corners=False)
    bitmap = F.grid_sample(images, grid + waves.permute(0, 2, 3, 1), align_corners=False)
    bitmap = (bitmap > uniform(0.2, 0.7)[:, None, None, None]).float()
    return F.avg_pool2d(bitmap, 32 // CELLS)


def batches(
    steps: int, size: int, generator: torch.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield `steps` batches of (images [size, 1, 16, 16] in -1..1, labels [size])."""
    images, labels = render_bank()
    for _ in range(steps):
        index = torch.randint(len(images), (size,), generator=generator)
        cells = bend(images[index], generator)
        pixels = F.interpolate(cells, size=(16, 16), mode="bilinear", align_corners=False)
        yield (pixels - 0.5) / 0.5, labels[index]


def main() -> None:
    """Pretrain and write the weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = timm.create_model(**GLYPH_VIT, num_classes=len(CLASSES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.5e-3, total_steps=args.steps, pct_start=0.1
    )
    right = seen = 0
    for step, (images, labels) in enumerate(batches(args.steps, args.batch_size, generator), 1):
        logits = model(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        right, seen = right + int((logits.argmax(1) == labels).sum()), seen + len(labels)
        if step % 100 == 0:
            print(
                f"step {step:5d}  loss {loss.item():.3f}  accuracy {right / seen:.3f}", flush=True
            )
            right = seen = 0
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("head.")}
    size = save_weights_json(args.output, state)
    print(f"wrote {args.output} ({size / 1e6:.2f} MB)")


if __name__ == "__main__":
    main()
