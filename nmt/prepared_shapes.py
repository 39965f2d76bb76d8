"""How much PyTorch keeps of what it has prepared for products of certain shapes on a CPU."""

import os

# oneDNN's store, and in each thread that of PyTorch's layer over it: by themselves 1,024 shapes of some 0.3 MB
# each. They are read when the first product is made.
_VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
_set: dict[str, str] = {}


def keep_prepared_shapes(count: int) -> None:
    """Let the libraries keep the last `count` shapes, unless the user has set how many.

    Call it before the first product. Sentences come in ever new shapes, so that most of what is kept is never used
    again, and lies between other memory that cannot be given back: it should be just enough for the layers of a
    batch to share. Images come in one shape, and each layer finds its own again in the next batch.
    """
    for name in _VARIABLES:
        if os.environ.get(name) == _set.get(name):
            os.environ[name] = _set[name] = str(count)
