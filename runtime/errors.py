"""The line between "you asked for something that can't be" and "the program failed"."""


class UserError(ValueError):
    """Bad configuration or input. A command shows it as one line, without a traceback, and exits with 2."""


class CheckpointError(UserError):
    """A checkpoint that is absent or damaged; the message names the file."""
