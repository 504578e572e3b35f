"""Where an MLflow tracker is, whether it answers, and a client for it."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import socket
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Read by mlflow while it is imported, hence before it. A user's own values win.
for _name, _value in {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_AGENT_HINT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # The defaults retry a dead server for minutes at each call, while a GPU waits.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}.items():
    os.environ.setdefault(_name, _value)

from mlflow import MlflowClient  # noqa: E402

from agl_bench.errors import TrackerUnavailable  # noqa: E402

PROBE_SECONDS = 5.0


@dataclass(frozen=True)
class Tracker:
    """An MLflow tracking address.

    Attributes:
        uri: for MLflow.
        artifacts: where files go if this process writes them itself; None = the server decides.
    """

    uri: str
    artifacts: Path | None

    @classmethod
    def of(cls, work: Path, uri: str | None) -> Tracker:
        """The given address, else that of MLFLOW_TRACKING_URI, else a database in the work folder.

        Raises:
            TrackerUnavailable: for an address that MLflow can no longer write to.
        """
        work = work.absolute()
        uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{work / 'mlflow.db'}"
        scheme = uri.partition(":")[0].partition("+")[0].lower()
        if scheme == "sqlite":
            return cls(uri, database_of(uri).parent / "mlartifacts")
        if scheme in ("http", "https", "databricks"):
            return cls(uri, None)
        if scheme in ("postgresql", "postgres", "mysql", "mssql"):
            return cls(uri, work / "mlartifacts")
        raise TrackerUnavailable(
            f"cannot track to '{uri}': use sqlite:///PATH/mlflow.db, or the http(s) address of an MLflow server "
            "(MLflow has retired plain folders)"
        )

    @property
    def is_server(self) -> bool:
        """Whether it is a web server already, with its own pages."""
        return self.uri.startswith("http")

    @property
    def name(self) -> str:
        """For messages: without a password."""
        return re.sub(r"(?<=://)[^/@]*@", "", self.uri)

    def probe(self) -> None:
        """Ask whether somebody is there; takes some seconds at most, where MLflow itself would try for minutes.

        Raises:
            TrackerUnavailable: if not, or if a database cannot be used.
        """
        parts = urllib.parse.urlsplit(self.uri)
        try:
            if self.is_server:
                address = urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
                with urllib.request.urlopen(f"{address.rstrip('/')}/health", timeout=PROBE_SECONDS):
                    pass
            elif parts.scheme != "sqlite" and parts.hostname and parts.port:
                socket.create_connection((parts.hostname, parts.port), PROBE_SECONDS).close()
        except urllib.error.HTTPError:
            return  # it answers, perhaps asking who we are: MLflow's own first request will tell
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise TrackerUnavailable(
                f"no MLflow server answers at {self.name} ({first_line(reason)}); start it, or leave --tracking and "
                "MLFLOW_TRACKING_URI unset to track into the work folder"
            ) from None
        if not self.is_server and parts.scheme != "sqlite":
            self._probe_database()

    def _probe_database(self) -> None:
        import sqlalchemy

        try:
            sqlalchemy.create_engine(self.uri, poolclass=sqlalchemy.NullPool).connect().close()
        except ImportError as error:
            raise TrackerUnavailable(
                f"cannot track to {self.name}: {first_line(error)}; for PostgreSQL pip install 'agl-bench[postgresql]' "
                "and write postgresql+psycopg://USER@HOST:PORT/DATABASE"
            ) from None
        except sqlalchemy.exc.SQLAlchemyError as error:
            raise TrackerUnavailable(f"cannot track to {self.name}: {first_line(error)}") from None


def database_of(uri: str) -> Path:
    """File of a sqlite address."""
    return Path(uri.partition(":///")[2].partition("?")[0]).absolute()


@contextlib.contextmanager
def lock(work: Path) -> Iterator[None]:
    """One process on this work folder at a time: two that create a database or a group at once fail or double it."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / ".mlflow.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def client_of(tracker: Tracker) -> MlflowClient:
    """MLflow's client, with explicit addresses and no chatter."""
    for noisy in ("alembic", "mlflow"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=tracker.uri, registry_uri=tracker.uri)


def first_line(error: object) -> str:
    """First line of an error, as part of a sentence."""
    text = str(error).strip() or type(error).__name__
    first = text.splitlines()[0].strip().rstrip(".;:")
    return first if len(first) <= 300 else first[:299] + "…"
