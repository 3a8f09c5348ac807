"""What a user can cause and mend. The message is one or two sentences: what happened, the numbers, the way out."""


class EngineError(Exception):
    """Base of every error meant for a person; the command line prints it and exits with 2."""


class ModelError(EngineError):
    """A checkpoint that cannot be used: unknown architecture, missing or misshapen tensor, damaged file."""


class OutOfBlocks(EngineError):
    """A search that cannot fit the KV budget, however much is evicted."""


class TaskError(EngineError):
    """A problem file, or a line of one, that cannot be read."""


class RunError(EngineError):
    """A run directory that cannot be continued with these settings."""


class MissingExtra(EngineError):
    """An optional library is needed and not installed; the message says what to install."""
