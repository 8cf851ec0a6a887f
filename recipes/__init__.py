"""The commands: each module parses a configuration and calls one `train` or `run`."""
