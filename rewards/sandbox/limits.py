"""What a program may use: the numbers that the jail enforces inside and the supervisor outside."""

from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one test: one fresh process and whatever it starts."""

    cpu_seconds: int = 5
    """Processor time of each process, whole seconds."""
    wall_seconds: float = 10.0
    """From its start to its end, by the supervisor's clock."""
    memory_mb: int = 1024
    """Address space of each process, and resident memory of all of them together."""
    output_bytes: int = 1 << 22
    """Of standard output, of standard error, and of a function's result, each."""
    processes: int = 32
    """Processes and threads at once, itself included."""
    tmp_mb: int = 32
    """Of files in /tmp and /dev/shm together; at most 128 files and folders a megabyte."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            allowed = (int, float) if field.name == "wall_seconds" else (int,)
            if type(value) not in allowed or not 0 < value < 1 << 31:
                kind = "number" if len(allowed) > 1 else "whole number"
                raise ValueError(f"{field.name}={value!r}: give a positive {kind}")
