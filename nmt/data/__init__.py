"""Text to pieces to memory-mapped token ids, and from there to batches, padded or packed."""
