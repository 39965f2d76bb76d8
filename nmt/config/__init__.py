"""Options: a typed dataclass <-> a YAML file <-> a command line; and records in files, read by a schema."""
