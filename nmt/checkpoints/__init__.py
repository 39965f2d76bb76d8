"""Folders on disk: a model's, which translates, and those of a run, which goes on."""
