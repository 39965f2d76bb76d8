"""What damaged files of image classification are made from, and who reads them (`fuzz_readers.py`)."""

import gzip
import random
from pathlib import Path

import numpy as np

from nmt.checkpoints.model_folder import write_model_folder
from nmt.checkpoints.weights import weights
from nmt.data.options import BatchingOptions
from nmt.options import TrainConfig
from nmt.vision.classifier import Classifier
from nmt.vision.options import ImageClassificationOptions
from nmt.vision.sources import open_images
from support.image_files import bars, write_idx

_MODEL = "timm/test_byobnet"
_MEGABYTES_OF_A_BOMB = 4_000


def make_idx(folder: Path) -> None:
    """Write MNIST's four files, two of them compressed."""
    write_idx(folder, "train", *bars(20), gz=True)
    write_idx(folder, "t10k", *bars(6, seed=1), gz=False)


def read_idx(folder: Path) -> None:
    """Open both parts, and look at the images as a run does."""
    for split in ("train", "valid"):
        images = open_images(folder, split)
        for index in range(len(images)):
            images.image(index)


def make_model(folder: Path) -> None:
    """Write the model folder of an untrained classifier."""
    data = folder.parent / f"{folder.name}-images"
    make_idx(data)
    options = ImageClassificationOptions(train_dir=data, val_fraction=0.2, model=_MODEL, image_size=32)
    task = options.build(None)
    config = TrainConfig(
        task="image_classification",
        task_options=options,
        save_dir=folder.parent,
        batching=BatchingOptions(batch_size=4, max_tokens=None),
    )
    folder.rmdir()
    write_model_folder(folder, weights(task.build_model()), config=config, task=task)


def read_model(folder: Path) -> None:
    """Load a model folder and let it classify."""
    images = [np.full((12, 12), shade, dtype=np.uint8) for shade in (0, 128)]
    list(Classifier.load(folder).predict(images))


def damage_header(data: bytes, rng: random.Random) -> bytes:
    """Change the type or a size in the header of an idx file."""
    content = bytearray(data)
    if rng.random() < 0.2:
        content[rng.randrange(4)] = rng.choice([0, 1, 3, 8, 9, 255])
    else:
        size = rng.choice([0, 1, 2, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1])
        place = 4 * rng.randrange(1, 4)
        content[place : place + 4] = size.to_bytes(4, "big")
    return bytes(content)


def damage_compressed(data: bytes, rng: random.Random) -> bytes:
    """Change what is in a gzip file, or let it hold much more than it should."""
    content = gzip.decompress(data)
    choice = rng.random()
    if choice < 0.6:
        return gzip.compress(damage_header(content, rng), mtime=0)
    if choice < 0.8:
        return data + rng.choice([data, b"\0" * 8, b"x", data[:20]])
    return (data if choice < 0.9 else b"") + _bomb(damage_header(content, rng))


def _bomb(head: bytes) -> bytes:
    """Return some megabytes that inflate to some gigabytes: members of zeros, one after the other."""
    megabytes = 100
    member = gzip.compress(bytes(megabytes * 2**20), mtime=0)
    return gzip.compress(head, mtime=0) + member * (_MEGABYTES_OF_A_BOMB // megabytes)
