"""Makes a picture: ``python tests/helpers/report_screenshot.py docs/how-to/report.png``.

The weights are made up: a toy whose layers are scaled, so that the plot has something to show.
"""

import subprocess
import sys
import tempfile
from io import BytesIO
from pathlib import Path

import chromium
import numpy as np
from PIL import Image
from playwright.sync_api import sync_playwright
from safetensors.numpy import load_file, save_file

from neox_bridge.verification.drawing import place_of

LAYERS = 12
SIZE = {"width": 1200, "height": 1000}


def main(picture: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        run(work, "toy", "pythia-70m", "pythia", "--as", "hf", "--layers", LAYERS)
        scale(work / "pythia" / "model.safetensors")
        run(work, "convert", "pythia", "pythia-neox", "--tp", 2)
        run(work, "report", "pythia-neox", "--source", "pythia")
        shot = shoot(work / "report.html")
    # few colours are enough, and a third of the bytes
    shot.convert("RGB").quantize(160, dither=Image.Dither.NONE).save(picture, optimize=True)
    print(f"{picture}: {picture.stat().st_size:,} bytes")


def run(work: Path, *arguments: object) -> None:
    command = [sys.executable, "-m", "neox_bridge", *map(str, arguments)]
    subprocess.run(command, cwd=work, check=True)


def scale(path: Path) -> None:
    """Norms that grow with the depth, and outputs that shrink, as training makes them."""
    random = np.random.default_rng(0)
    tensors = load_file(path)
    for name, tensor in tensors.items():
        kind, layer = place_of(name)
        depth = ((layer or 0) + 1) / LAYERS
        if "norm" in kind and kind.endswith("weight"):
            spread = random.normal(1 + depth, 0.1 + 0.2 * depth, tensor.shape)
            tensors[name] = spread.astype(tensor.dtype)
        elif kind.startswith(("attention", "mlp")):
            power = 0.5 if "dense.weight" in kind or "4h_to_h" in kind else -0.3
            tensors[name] = (tensor * (1.5 - depth) ** power).astype(tensor.dtype)
    save_file(tensors, path, metadata={"format": "pt"})


def shoot(page: Path) -> Image.Image:
    with sync_playwright() as manager:
        browser = manager.chromium.launch(
            executable_path=chromium.find(),
            env=chromium.environment(),
            args=["--disable-gpu", "--no-zygote"],
        )
        tab = browser.new_page(viewport=SIZE)
        tab.goto(page.as_uri())
        foot = tab.locator("figure").first.evaluate("e => e.getBoundingClientRect().bottom")
        clip = {"x": 0, "y": 0, "width": SIZE["width"], "height": foot + 16}
        data = tab.screenshot(full_page=True, clip=clip)
        browser.close()
    return Image.open(BytesIO(data))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
