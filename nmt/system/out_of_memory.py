"""Whether an error says that there is no memory, on any kind of device. Imports no torch."""

# PyTorch's allocators share no type of error, so their texts tell: CPU (Linux, Windows), CUDA and MPS.
_SIGNS = ("can't allocate memory", "not enough memory", "out of memory")
_TYPE = "OutOfMemoryError"  # torch's, which some allocators raise


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether smaller batches may help: memory was asked for, and there was none."""
    if isinstance(error, MemoryError):
        return True
    is_of_type = any(kind.__name__ == _TYPE for kind in type(error).__mro__)
    return is_of_type or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS))
