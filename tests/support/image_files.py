"""Small labelled images: folders of class folders, and files in MNIST's format."""

import gzip
import struct
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"blue": (40, 60, 200), "green": (40, 190, 60), "red": (200, 50, 40)}


def write_folders(root: Path, num_images: dict[str, int], *, side: int = 24) -> Path:
    """Write noisy PNG files of the colours that the classes are named after; no two images are the same."""
    rng = np.random.default_rng(len(root.name))
    for name, count in num_images.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            noise = rng.integers(-40, 41, (side, side + 4, 3))
            pixels = (np.array(COLOURS[name]) + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:03}.png")
    return root


def idx_bytes(values: np.ndarray) -> bytes:
    header = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape)
    return header + values.astype(np.uint8).tobytes()


def write_idx(folder: Path, part: str, images: np.ndarray, labels: np.ndarray, *, gz: bool = False) -> Path:
    """Write one part, "train" or "t10k", as MNIST names it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
        content = idx_bytes(values)
        path = folder / (f"{part}-{name}" + (".gz" if gz else ""))
        path.write_bytes(gzip.compress(content) if gz else content)
    return folder


def bars(count: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return (count, 12, 12) images of a horizontal (label 0) or a vertical bar (label 1), and the labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    images = rng.integers(0, 60, (count, 12, 12))
    for image, label in zip(images, labels, strict=True):
        place = int(rng.integers(3, 8))
        (image if label == 0 else image.T)[place : place + 2] = 250
    return images.astype(np.uint8), labels
