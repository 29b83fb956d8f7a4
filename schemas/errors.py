"""Every error a user can meet, in one place.

Each message says the rule, the value that broke it and the fix, in one sentence or two. Each class
inherits the builtin that a caller would expect, so that `except ValueError` keeps working. The
command line prints the message alone and exits with status 2.
"""


class RetortError(Exception):
    """Base of every foreseeable failure; anything else that escapes is a bug."""


class ConfigError(RetortError, ValueError):
    """A run config, a flag or an input file breaks a stated rule."""


class ManifestMismatchError(RetortError, ValueError):
    """A store was made under another config, tokenizer, teacher or vocabulary than this run's."""


class FormatVersionError(RetortError, ValueError):
    """A store's format version is not one that this code reads."""


class StoreNotFoundError(RetortError, FileNotFoundError):
    """There is no store, or no such set of targets, at the path that was given."""


class StorageError(RetortError, OSError):
    """The disk or bucket under a store cannot be reached, refuses access or fails a request."""


class CorruptStoreError(RetortError, OSError):
    """Stored bytes disagree with their checksum, their ledger record or their manifest."""


class IncompleteStoreError(RetortError, LookupError):
    """Rows were asked for whose shard has not been committed yet."""


class BudgetError(RetortError, ValueError):
    """A sampler cannot meet the store's fixed number of entries per block."""


class AlignmentError(RetortError, ValueError):
    """Stored targets do not belong to the tokens beside them."""


class CheckpointError(RetortError, ValueError):
    """A checkpoint cannot be read into this model or continued by this run."""


class SaveError(CheckpointError):
    """A checkpoint could not be written; the ones before it are as they were."""


class HostError(RetortError, ConnectionError):
    """Another process of a run failed, or cannot be reached."""


class DivergenceError(RetortError, FloatingPointError):
    """Training produced a loss that is not a number."""


class DeviceMemoryError(RetortError, MemoryError):
    """A step needs more memory than a chip has."""


class MissingDependencyError(RetortError, ImportError):
    """An optional package that the requested feature needs is not installed."""
