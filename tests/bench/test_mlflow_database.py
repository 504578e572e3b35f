"""MLflow's database is whole or not there, whoever is killed while it is made and however many start at once."""

import fcntl
import multiprocessing
import os
import shutil
import sqlite3
from pathlib import Path

import pytest
import sqlalchemy
from mlflow import MlflowClient
from mlflow.store.db import utils as schema
from mlflow.store.tracking.dbmodels.initial_models import Base as InitialBase

from agl_bench.bench.mlflow_database import make_ready
from agl_bench.bench.mlflow_recorder import MlflowRecorder
from agl_bench.bench.mlflow_tracker import Tracker, client_of
from agl_bench.errors import TrackerUnavailable

OLDER = "27a6a02d2cf1"  # a schema of MLflow 2


def tables_of(database: Path) -> set[str]:
    with sqlite3.connect(database) as connection:
        return {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def engine_of(database: Path) -> sqlalchemy.Engine:
    return sqlalchemy.create_engine(f"sqlite:///{database}", poolclass=sqlalchemy.NullPool)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A database as MLflow has it now."""
    database = tmp_path_factory.mktemp("whole") / "mlflow.db"
    make_ready(database, is_ours=True, warn=pytest.fail)
    return database


@pytest.fixture
def quick(whole: Path, monkeypatch) -> None:
    """Making a database is a copy."""
    monkeypatch.setattr(schema, "_initialize_tables", lambda engine: shutil.copy(whole, engine.url.database))


@pytest.fixture(scope="module")
def older(tmp_path_factory) -> Path:
    """A database of an older MLflow that holds an experiment."""
    from alembic import command

    database = tmp_path_factory.mktemp("older") / "mlflow.db"
    engine = engine_of(database)
    InitialBase.metadata.create_all(engine)
    config = schema._get_alembic_config(str(engine.url))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, OLDER)
    with sqlite3.connect(database) as connection:
        connection.execute(
            "INSERT INTO experiments (experiment_id, name, lifecycle_stage) VALUES (7, 'kept', 'active')"
        )
    return database


def cut(database: Path) -> None:
    database.write_bytes(database.read_bytes()[: database.stat().st_size // 2])


def empty_pages(database: Path) -> None:
    content = bytearray(database.read_bytes())
    content[8192:40960] = bytes(32768)
    database.write_bytes(content)


def garbage(database: Path) -> None:
    database.write_bytes(b"no database " * 1000)


def first_tables(database: Path) -> None:
    database.unlink()
    InitialBase.metadata.create_all(engine_of(database))
    with sqlite3.connect(database) as connection:
        connection.execute("DROP TABLE experiments")


def within_a_step(database: Path) -> None:
    """Killed after a table of the next step was made, and before the step was noted."""
    database.unlink()
    InitialBase.metadata.create_all(engine_of(database))
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE experiment_tags (key TEXT)")


def without_a_table(database: Path) -> None:
    with sqlite3.connect(database) as connection:
        connection.execute("DROP TABLE latest_metrics")


@pytest.mark.parametrize("spoil", [cut, empty_pages, garbage, first_tables, within_a_step, without_a_table])
@pytest.mark.usefixtures("quick")
def test_what_is_damaged_or_half_made_is_set_aside(spoil, whole: Path, tmp_path: Path) -> None:
    database, said = tmp_path / "mlflow.db", list[str]()
    shutil.copy(whole, database)
    spoil(database)
    before = database.read_bytes()
    with pytest.raises(TrackerUnavailable, match="agl-bench sync"):  # a stranger's file is left alone
        make_ready(database, is_ours=False, warn=said.append)
    assert database.read_bytes() == before and not said
    make_ready(database, is_ours=True, warn=said.append)
    assert (tmp_path / "mlflow.db.damaged-1").read_bytes() == before
    assert len(said) == 1 and "mlflow.db.damaged-1" in said[0] and "agl-bench sync" in said[0]
    assert tables_of(database) == tables_of(whole)


@pytest.mark.parametrize("left", ["nothing", "empty", "journal", "unfinished"])
@pytest.mark.usefixtures("quick")
def test_what_a_killed_start_leaves_is_no_hindrance(left: str, whole: Path, tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    if left == "empty":
        database.touch()
    elif left == "journal":  # of a database that somebody has removed
        database.with_name("mlflow.db-journal").write_bytes(bytes(4096))
    elif left == "unfinished":
        garbage(tmp_path / ".mlflow.db.new")
    make_ready(database, is_ours=True, warn=pytest.fail)
    assert tables_of(database) == tables_of(whole)
    assert {p.name for p in tmp_path.iterdir()} == {"mlflow.db", ".mlflow.db.users"}


def test_an_older_one_is_brought_up_to_date_whole(older: Path, whole: Path, tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    shutil.copy(older, database)
    with (tmp_path / ".mlflow.db.users").open("w") as user:
        fcntl.flock(user, fcntl.LOCK_SH)
        with pytest.raises(TrackerUnavailable, match="another agl-bench process"):
            make_ready(database, is_ours=True, warn=pytest.fail)
    assert database.read_bytes() == older.read_bytes()
    make_ready(database, is_ours=True, warn=pytest.fail)
    assert tables_of(database) == tables_of(whole)
    with sqlite3.connect(database) as connection:
        assert connection.execute("SELECT name FROM experiments WHERE experiment_id = 7").fetchone() == ("kept",)


def test_a_migration_that_is_cut_short_changes_nothing(older: Path, tmp_path: Path, monkeypatch) -> None:
    database = tmp_path / "mlflow.db"
    shutil.copy(older, database)
    upgrade = schema._upgrade_db

    def cut_short(engine):
        upgrade(engine)
        raise KeyboardInterrupt

    monkeypatch.setattr(schema, "_upgrade_db", cut_short)
    with pytest.raises(KeyboardInterrupt):
        make_ready(database, is_ours=True, warn=pytest.fail)
    assert database.read_bytes() == older.read_bytes()


def test_what_can_only_be_refused(whole: Path, tmp_path: Path) -> None:
    newer = tmp_path / "newer.db"
    shutil.copy(whole, newer)
    with sqlite3.connect(newer) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
    os.mkfifo(tmp_path / "pipe.db")
    (tmp_path / "folder.db").mkdir()
    for name, why in (("newer", "newer MLflow"), ("pipe", "not a file"), ("folder", "not a file")):
        with pytest.raises(TrackerUnavailable, match=why):
            make_ready(tmp_path / f"{name}.db", is_ours=True, warn=pytest.fail)


@pytest.mark.usefixtures("quick")
def test_a_link_stays_one(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "mlflow.db").symlink_to(tmp_path / "disk" / "mlflow.db")
    make_ready(tmp_path / "mlflow.db", is_ours=True, warn=pytest.fail)
    assert (tmp_path / "mlflow.db").is_symlink()
    assert tables_of(tmp_path / "disk" / "mlflow.db") == tables_of(whole)


def _start(work: Path) -> None:
    client = client_of(Tracker.of(work, None))
    assert client.get_experiment_by_name("Default") is not None


def test_several_that_start_at_once_all_get_a_client(tmp_path: Path) -> None:
    forked = multiprocessing.get_context("fork")
    starts = [forked.Process(target=_start, args=(tmp_path,)) for _ in range(3)]
    for process in starts:
        process.start()
    for process in starts:
        process.join()
    assert [process.exitcode for process in starts] == [0, 0, 0]


@pytest.mark.usefixtures("quick")
def test_the_recorder_says_what_it_set_aside(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"no database")
    said = list[str]()
    recorder = MlflowRecorder.connect(tmp_path, warn=said.append)
    assert len(said) == 1 and recorder.dead is None
    assert MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").get_experiment_by_name("agl-bench/intra") is not None
