"""How much PyTorch keeps of what it has prepared for products of certain shapes on a CPU."""

import os

# oneDNN's store, and in each thread that of PyTorch's layer over it: else 1,024 shapes, 0.3 to 0.6 MB each.
# They are read when the first product is made.
_VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def keep_prepared_shapes(count: int) -> None:
    """Let the libraries keep the last `count` shapes, unless the user has set how many.

    Call it before the first product. Sentences come in ever new shapes, so that most of what is kept is never used
    again, and lies between other memory that cannot be given back: it should be just enough for the layers of a
    batch to share, in each thread that takes batches of its own. Images come in one shape, and each layer finds
    its own again in the next batch.
    """
    for name in _VARIABLES:
        # What was set here, and not by the user, in this process or in one that started it.
        ours = f"NMT_{name}"
        if os.environ.get(name) == os.environ.get(ours):
            os.environ[name] = os.environ[ours] = str(count)
