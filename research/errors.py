"""Errors a user can act on. The command line prints their message alone; anything else keeps its traceback."""


class ConfigError(ValueError):
    """A configuration value or key that cannot be used: names the key, what was given and what is valid."""


class CheckpointError(ValueError):
    """A checkpoint, run folder or weights file that does not fit what it is loaded into."""


class CacheError(ValueError):
    """A signal cache that was not made for this teacher, these data or this view."""


class StoreError(ValueError):
    """A trace store that was begun with other settings, is held by another writer, or is not as it was written."""


class NonFiniteLoss(RuntimeError):
    """The loss stopped being finite; the message holds the step and the batch's indices."""


class RolloutError(RuntimeError):
    """What the student writes can no longer be trained on: it never stops, or it is too far from who is trained."""


class Pruned(RuntimeError):
    """A run that a sweep's pruner ended early; what it reported until then is kept."""


class Preempted(RuntimeError):
    """The run was asked to stop by a signal and can be resumed; ``exit_code`` is 128 + the signal's number."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
