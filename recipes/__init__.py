"""The commands: each module parses a configuration and calls one `train` or `run`."""

import os

from runtime.environment import keep_freed_memory

# Before torch starts its threads: by default they spin while they wait for each other, and when anything else wants a
# core a step of the tiny model takes five times as long (measured on two cores: 0.87 s against 0.18 s).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
keep_freed_memory()
