"""The built-in task: translation, from a data directory to BLEU."""
