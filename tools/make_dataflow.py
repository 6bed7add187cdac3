"""Draw nbs/images/dataflow.png: from an image to an answer, with the shape of what passes along each arrow.
Sizes are those of the paper's main setting and are read from its config.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from make_card import car, window_means
from matplotlib.patches import FancyBboxPatch
from PIL import Image

from delta_llava.config import ProjectorConfig, clip_l14_336

FIGURE = Path(__file__).resolve().parent.parent / "nbs" / "images" / "dataflow.png"
FROZEN, TRAINED, INK = "#dce3ec", "#fbdcae", "#1f2430"
IMAGE_SIZE = 336  # px


def box(ax: plt.Axes, left: float, title: str, lines: str, color: str, width: float = 1.55):
    "A part of the model, with its name and what it does."
    style = dict(boxstyle="round,pad=0,rounding_size=0.08", fc=color, ec=INK, lw=1.2)
    ax.add_patch(FancyBboxPatch((left, 0.75), width, 1.5, **style))
    ax.text(left + width / 2, 1.98, title, ha="center", va="center", weight="bold", fontsize=11)
    ax.text(left + width / 2, 1.32, lines, ha="center", va="center", fontsize=9, linespacing=1.35)


def arrow(ax: plt.Axes, start: tuple[float, float], end: tuple[float, float], label: str = ""):
    "An arrow with the shape of what it carries above it."
    ax.annotate("", end, start, arrowprops=dict(arrowstyle="-|>", color=INK, lw=1.6, shrinkA=0, shrinkB=0))
    middle = (start[0] + end[0]) / 2
    ax.text(middle, start[1] + 0.12, label, ha="center", va="bottom", fontsize=9)


def picture(ax: plt.Axes, pixels: np.ndarray, left: float, grid: int | None, label: str):
    "The image, or its windows in their mean colors, with a line of text below."
    if grid is not None:
        pixels = window_means(pixels, grid)
    ax.imshow(pixels, extent=(left, left + 1.2, 0.9, 2.1), interpolation="nearest", zorder=2)
    if grid is not None:
        for edge in np.linspace(0, 1.2, grid + 1):
            ax.plot([left + edge] * 2, [0.9, 2.1], color="w", lw=0.4, zorder=3)
            ax.plot([left, left + 1.2], [0.9 + edge] * 2, color="w", lw=0.4, zorder=3)
    ax.text(left + 0.6, 0.8, label, ha="center", va="top", fontsize=9)


def draw_dataflow(config: ProjectorConfig) -> Image.Image:
    "The whole figure."
    n, v, levels = config.grid**2, config.tokens, len(config.levels)
    c, d = config.d_vision, config.d_llm
    fig, ax = plt.subplots(figsize=(13, 2.5), dpi=110)
    pixels = car()
    picture(ax, pixels, 0.1, None, "image")
    arrow(ax, (1.35, 1.5), (2.3, 1.5), f"3×{IMAGE_SIZE}×{IMAGE_SIZE}")
    box(ax, 2.35, "Vision tower", f"frozen ViT\nlevels\n{', '.join(map(str, config.levels))}", FROZEN)
    arrow(ax, (3.95, 1.5), (5.1, 1.5), f"{n}×({levels}·{c})\npatch tokens")
    box(
        ax,
        5.15,
        "Projector",
        "shrink, mix: queries\nbase + delta: q, k, v\nattend in windows\nMLP",
        TRAINED,
        1.75,
    )
    arrow(ax, (6.95, 1.5), (7.95, 1.5), f"{v}×{d}\nvisual tokens")
    picture(ax, pixels, 8.0, config.g, f"{v} windows")
    arrow(ax, (9.25, 1.5), (10.0, 1.5))
    box(ax, 10.05, "LLM", "visual tokens,\nthen text tokens", FROZEN)
    arrow(ax, (11.65, 1.5), (12.15, 1.5))
    ax.text(12.2, 1.5, "“A red car.”", va="center", fontsize=11)
    ax.annotate("", (10.82, 0.7), (10.82, 0.3), arrowprops=dict(arrowstyle="-|>", color=INK, lw=1.6))
    ax.text(10.82, 0.25, f"“What is in the picture?”   t×{d}", ha="center", va="top", fontsize=9)
    ax.text(2.35, 0.25, "gray: pretrained, frozen (stage 2 trains the LLM as well)", va="top", fontsize=8.5)
    ax.text(2.35, 0.02, "orange: trained in both stages", va="top", fontsize=8.5)
    ax.set(xlim=(0, 13.3), ylim=(-0.2, 2.35), aspect="equal")
    ax.axis("off")
    fig.subplots_adjust(0.005, 0.01, 0.995, 0.99)
    fig.canvas.draw()
    return Image.fromarray(np.asarray(fig.canvas.buffer_rgba())).convert("RGB")


if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else FIGURE
    draw_dataflow(clip_l14_336()).quantize(96).save(out, optimize=True)
