"""Flask-CommonDB: sessions that always close, replicas that can be read, procedures that report."""

from __future__ import annotations

from .errors import CommonDBError
from .errors import ConfigError
from .errors import CrossBindError
from .errors import NoContextError
from .errors import PartialCommitError
from .errors import ProcedureNotSupported
from .errors import UnknownBindError
from .errors import WrongBindError
from .extension import CommonDB
from .procedures import ProcedureResult

__all__ = [
    "CommonDB",
    "CommonDBError",
    "ConfigError",
    "CrossBindError",
    "NoContextError",
    "PartialCommitError",
    "ProcedureNotSupported",
    "ProcedureResult",
    "UnknownBindError",
    "WrongBindError",
]
