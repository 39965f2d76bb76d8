"""The Transformer and its parts."""
