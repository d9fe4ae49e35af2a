"""The errors that a user can cause and mend."""


class InputError(ValueError):
    """A mistake in what the user gave; the message is one line and says what would be right."""


class CheckpointError(RuntimeError):
    """A checkpoint or a record could not be written or read; what was there before is untouched."""


class RankError(RuntimeError):
    """Another process of a ``torchrun`` job is gone or has failed; the message names it."""
