"""Train translation models from raw text, and translate with them."""

__version__ = "0.1.0"
