"""Text to pieces to memory-mapped token ids, and from there to padded batches."""
