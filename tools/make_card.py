"""Draw nbs/images/card.png, what a link to the site shows elsewhere: one picture at ever fewer visual
tokens, each the mean of its window.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from delta_llava.scenes import load_cutout

thing = load_cutout("car", "fluent")
thing = thing.resize((304, 304 * thing.height // thing.width), Image.Resampling.LANCZOS)
image = Image.new("RGBA", (336, 336), "#f2f2f2")
image.alpha_composite(thing, (16, (336 - thing.height) // 2))
pixels = np.asarray(image.convert("RGB"), float) / 255

fig = plt.figure(figsize=(12, 6.3), dpi=100, facecolor="#1f2430")
fig.text(0.05, 0.84, "delta_llava", color="w", fontsize=40, weight="bold")
fig.text(
    0.05,
    0.75,
    "A token-efficient visual projector, and every projector it is compared with",
    color="#c8d0dc",
    fontsize=19,
)
for i, (side, name) in enumerate(
    [(None, "picture"), (24, "576 patches"), (12, "144 tokens"), (6, "36 tokens"), (1, "1 token")]
):
    ax = fig.add_axes([0.05 + 0.183 * i, 0.2, 0.165, 0.42])
    if side:
        ax.imshow(
            pixels.reshape(side, 336 // side, side, 336 // side, 3).mean((1, 3)), interpolation="nearest"
        )
    else:
        ax.imshow(pixels)
    if side:
        ax.set(xticks=np.arange(side + 1) - 0.5, yticks=np.arange(side + 1) - 0.5)
        ax.grid(color="#1f2430", lw=0.8)
    ax.tick_params(length=0, labelbottom=False, labelleft=False)
    if not side:
        ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set_visible(False)
    fig.text(0.05 + 0.183 * i + 0.0825, 0.13, name, color="w", fontsize=17, ha="center")
fig.canvas.draw()
drawn = Image.fromarray(np.asarray(fig.canvas.buffer_rgba())).convert("RGB").quantize(96)  # a small file
drawn.save(Path(__file__).resolve().parent.parent / "nbs" / "images" / "card.png", optimize=True)
