"""How much PyTorch keeps of what it has prepared for products of certain shapes on a CPU."""

import os

# Sizes of oneDNN's cache, and of the cache of PyTorch's layer over it, which each thread has. The default is 1,024
# shapes of 0.3 to 0.6 MB each. The variables are read at the first product.
_VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def keep_prepared_shapes(count: int) -> None:
    """Let the libraries keep the last `count` shapes, unless the user has set how many.

    Call it before the first product. Batches of sentences keep having new shapes, so most shapes are never used
    again, and they keep memory around them from being given back. There should be just enough for the layers of a
    batch to share, in each thread that takes batches of its own. Images come in one shape, and each layer finds
    its shape again in the next batch.
    """
    for name in _VARIABLES:
        # Set by this function, in this process or in one that started it, and not by the user.
        ours = f"NMT_{name}"
        if os.environ.get(name) == os.environ.get(ours):
            os.environ[name] = os.environ[ours] = str(count)
