"""The image-classification task: a plugin, made of what the core offers to any package."""
