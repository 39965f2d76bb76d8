"""The commands: parse, assemble, call."""
