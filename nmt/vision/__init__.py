"""The image-classification task: a plugin that uses only what the core offers to all packages."""
