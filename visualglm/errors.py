"""The exceptions users meet. Each message is one sentence: the thing, the limit, the remedy."""

import errno

# Of an `OSError`: the disk, a quota, or what a single file may take is full.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class VisualGLMError(Exception):
    """Base of every error this package raises on purpose; the CLI prints it and exits with 1, a server answers 4xx."""


class ConfigError(VisualGLMError):
    """A configuration value is unknown, out of range, or contradicts another."""


class CheckpointError(VisualGLMError):
    """A checkpoint or model directory is missing, damaged, or does not fit its configuration."""


class TokenizerError(VisualGLMError):
    """A tokenizer file is missing, damaged, or is not the one the model was trained with."""


class ImageError(VisualGLMError):
    """An image cannot be read, or is larger than the limits."""


class PromptError(VisualGLMError):
    """A question or a conversation cannot be put to the model."""


class DeviceError(VisualGLMError):
    """A backend, a device, a precision or the memory that was asked for is not there."""


class DataError(VisualGLMError):
    """A data file of questions or training rows is malformed."""
