"""Options: a typed dataclass <-> a YAML file <-> a command line. Also records in files, which a schema checks."""
