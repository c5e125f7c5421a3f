"""Flask-CommonDB: sessions that always close, replicas that can be read, procedures that report."""

from __future__ import annotations

from .errors import CommonDBError
from .errors import ConfigError
from .errors import CrossBindError
from .errors import NoContextError
from .errors import NoReplicaError
from .errors import OpenTransactionError
from .errors import PartialCommitError
from .errors import PoolExhausted
from .errors import ProcedureNotSupported
from .errors import StatementTimeout
from .errors import TwoPhaseNotSupported
from .errors import UnknownBindError
from .errors import UnknownReplicaError
from .errors import WrongBindError
from .extension import CommonDB
from .holders import Holder
from .holders import PoolStatus
from .overview import ServerStatus
from .procedures import ProcedureResult
from .router import Route
from .streams import Stream

__all__ = [
    "CommonDB",
    "CommonDBError",
    "ConfigError",
    "CrossBindError",
    "Holder",
    "NoContextError",
    "NoReplicaError",
    "OpenTransactionError",
    "PartialCommitError",
    "PoolExhausted",
    "PoolStatus",
    "ProcedureNotSupported",
    "ProcedureResult",
    "Route",
    "ServerStatus",
    "StatementTimeout",
    "Stream",
    "TwoPhaseNotSupported",
    "UnknownBindError",
    "UnknownReplicaError",
    "WrongBindError",
]
