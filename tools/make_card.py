"""Draw nbs/images/card.png, the preview image of links to the site: one image with decreasing budgets.
Each token is drawn in the mean color of its window. Beside it favicon.png, the icon of the site's pages.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageDraw

from delta_llava.scenes import load_cutout

CARD = Path(__file__).resolve().parent.parent / "nbs" / "images" / "card.png"
SIDE = 336  # px
BACKGROUND = "#1f2430"
PANELS = ((None, "image"), (24, "576 patches"), (12, "144 tokens"), (6, "36 tokens"), (1, "1 token"))


def car() -> np.ndarray:
    "A car on a plain background, [row, column, channel] from 0 to 1."
    cutout = load_cutout("car", "fluent")
    width = SIDE - 32
    cutout = cutout.resize((width, width * cutout.height // cutout.width), Image.Resampling.LANCZOS)
    image = Image.new("RGBA", (SIDE, SIDE), "#f2f2f2")
    image.alpha_composite(cutout, (16, (SIDE - cutout.height) // 2))
    return np.asarray(image.convert("RGB"), float) / 255


def window_means(pixels: np.ndarray, grid: int) -> np.ndarray:
    "Mean color of each window."
    window = SIDE // grid
    return pixels.reshape(grid, window, grid, window, 3).mean((1, 3))


def draw_panel(ax: plt.Axes, pixels: np.ndarray, grid: int | None):
    "The image, or its windows on a grid."
    ax.tick_params(length=0, labelbottom=False, labelleft=False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    if grid is None:
        ax.imshow(pixels)
        ax.set(xticks=[], yticks=[])
        return
    ax.imshow(window_means(pixels, grid), interpolation="nearest")
    edges = np.arange(grid + 1) - 0.5
    ax.set(xticks=edges, yticks=edges)
    ax.grid(color=BACKGROUND, lw=0.8)


def draw_card() -> Image.Image:
    "The whole card."
    pixels = car()
    subtitle = "A token-efficient visual projector, and every projector it is compared with"
    fig = plt.figure(figsize=(12, 6.3), dpi=100, facecolor=BACKGROUND)
    fig.text(0.05, 0.84, "delta_llava", color="w", fontsize=40, weight="bold")
    fig.text(0.05, 0.75, subtitle, color="#c8d0dc", fontsize=19)
    for i, (grid, label) in enumerate(PANELS):
        left = 0.05 + 0.183 * i
        draw_panel(fig.add_axes([left, 0.2, 0.165, 0.42]), pixels, grid)
        fig.text(left + 0.0825, 0.13, label, color="w", fontsize=17, ha="center")
    fig.canvas.draw()
    return Image.fromarray(np.asarray(fig.canvas.buffer_rgba())).convert("RGB")


def draw_favicon(side: int = 64) -> Image.Image:
    "The letter delta, drawn large and reduced so that its edges are smooth."
    large = 8 * side
    icon = Image.new("RGBA", (large, large))
    pen = ImageDraw.Draw(icon)
    pen.rounded_rectangle((0, 0, large - 1, large - 1), radius=large // 6, fill=BACKGROUND)
    corners = [(0.5, 0.2), (0.84, 0.8), (0.16, 0.8)]
    pen.polygon([(large * x, large * y) for x, y in corners], outline="#7ab8ff", width=large // 10)
    return icon.resize((side, side), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    draw_favicon().save(CARD.with_name("favicon.png"), optimize=True)
    draw_card().quantize(96).save(CARD, optimize=True)  # 96 colors make a small file
