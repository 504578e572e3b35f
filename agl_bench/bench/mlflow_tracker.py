"""Where an MLflow tracker is, whether it answers, and a client for it."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
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

from agl_bench.addresses import is_ambiguous, masked  # noqa: E402
from agl_bench.bench.mlflow_database import make_ready  # noqa: E402
from agl_bench.errors import TrackerUnavailable  # noqa: E402

PROBE_SECONDS = 5.0


@dataclass(frozen=True)
class Tracker:
    """An MLflow tracking address.

    Attributes:
        uri: for MLflow.
        artifacts: where files go if this process writes them itself; None = the server decides.
        work: the work folder.
    """

    uri: str
    artifacts: Path | None
    work: Path

    @classmethod
    def of(cls, work: Path, uri: str | None) -> Tracker:
        """The given address, else that of MLFLOW_TRACKING_URI, else a database in the work folder.

        Raises:
            TrackerUnavailable: for an address that MLflow can no longer write to.
        """
        work = work.absolute()
        uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{work / 'mlflow.db'}"
        scheme = uri.partition(":")[0].partition("+")[0].lower()
        if is_ambiguous(uri):
            raise TrackerUnavailable(
                f"cannot track to '{masked(uri)}': its port is not a number, or a password holds a separator; write "
                "HOST:5000, and in a password %40 for @, %3A for :, %2F for /, %3F for ? and %23 for #"
            )
        if scheme == "sqlite":
            own = work / "mlflow.db"
            if uri == f"sqlite:///{own}" and not (_is_utf8(own) and database_of(uri) == own):
                raise TrackerUnavailable(
                    f"MLflow cannot open a database in {work}, because its addresses cannot hold ?, % or bytes that "
                    "are not UTF-8; use another folder, another tracking address, or --tracking none"
                )
            return cls(uri, database_of(uri).parent / "mlartifacts", work)
        if scheme in ("http", "https", "databricks"):
            return cls(uri, None, work)
        if scheme in ("postgresql", "postgres", "mysql", "mssql"):
            return cls(uri, work / "mlartifacts", work)
        raise TrackerUnavailable(
            f"cannot track to '{masked(uri)}': use sqlite:///PATH/mlflow.db, or the http(s) address of a server "
            "(MLflow has retired plain folders)"
        )

    @property
    def is_server(self) -> bool:
        """Whether it is a web server already, with its own pages."""
        return self.uri.startswith("http")

    @property
    def is_file(self) -> bool:
        """Whether it is a database in a file of this machine."""
        return self.uri.startswith("sqlite")

    @property
    def name(self) -> str:
        """For messages: without a secret."""
        return masked(self.uri)

    @property
    def page(self) -> str:
        """Address of a server for a browser, which asks for the password by itself."""
        parts = urllib.parse.urlsplit(self.uri)
        return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", "")).rstrip("/")

    def probe(self) -> None:
        """Ask whether somebody is there; takes some seconds at most, where MLflow itself would try for minutes.

        Raises:
            TrackerUnavailable: if not, or if a database cannot be used.
        """
        parts = urllib.parse.urlsplit(self.uri)
        try:
            if self.is_server:
                with urllib.request.urlopen(f"{self.page}/health", timeout=PROBE_SECONDS):
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
    """File of a sqlite address.

    Raises:
        TrackerUnavailable: if it names none.
    """
    import sqlalchemy

    try:
        name = sqlalchemy.make_url(uri).database
    except sqlalchemy.exc.ArgumentError:
        name = None
    if not name or name == ":memory:" or name.startswith("file:"):
        raise TrackerUnavailable(f"'{masked(uri)}' does not name a file; use sqlite:///PATH/mlflow.db")
    return Path(name).absolute()


def _is_utf8(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


@contextlib.contextmanager
def lock(tracker: Tracker) -> Iterator[None]:
    """One process at a time on a database in a file, else on the work folder: two at once would double a group.

    Raises:
        OSError: if the folder cannot be written.
    """
    folder = Path(os.path.realpath(database_of(tracker.uri))).parent if tracker.is_file else tracker.work
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".mlflow.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def client_of(tracker: Tracker, warn: Callable[[str], None] | None = None) -> MlflowClient:
    """MLflow's client, with explicit addresses and no chatter, on a database that is whole.

    Args:
        tracker: where to.
        warn: says one line to the user; None = on stderr.

    Raises:
        TrackerUnavailable: if a database in a file cannot be used.
        Exception: whatever MLflow and its database raise.
    """
    for noisy in ("alembic", "mlflow"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if not tracker.is_file:
        return MlflowClient(tracking_uri=tracker.uri, registry_uri=tracker.uri)
    with lock(tracker):  # also while the client is made, which adds what every database of MLflow has
        own = os.path.realpath(tracker.work / "mlflow.db")
        database = database_of(tracker.uri)
        make_ready(database, is_ours=os.path.realpath(database) == own, warn=warn or to_stderr)
        return MlflowClient(tracking_uri=tracker.uri, registry_uri=tracker.uri)


def to_stderr(line: str) -> None:
    """Say one line to the user."""
    print(line, file=sys.stderr, flush=True)


def first_line(error: object) -> str:
    """First line of an error, as part of a sentence, without a secret."""
    text = masked(error).strip() or type(error).__name__
    first = text.splitlines()[0].strip().rstrip(".;:")
    return first if len(first) <= 300 else first[:299] + "…"
