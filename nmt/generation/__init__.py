"""Search over the outputs of a sequence model: beam search and what goes with it."""
