"""Leases: one holder for each cell, and nobody waits for the dead."""

import multiprocessing
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from agl_bench.bench import leases as leases_module
from agl_bench.bench.leases import STALE, Lease, Leases, Owner, TakenOver

DEAD = 99_999_999  # above any system's largest process id


@pytest.fixture
def leases(tmp_path):
    return Leases(tmp_path / "leases")


def hold(leases, key, owner, seconds_ago=0.0):
    """A lease as another process would have it; returns its file."""
    path = leases.folder / key / owner.name
    path.parent.mkdir(parents=True)
    path.touch()
    then = path.stat().st_mtime - seconds_ago
    os.utime(path, (then, then))
    return path


def elsewhere():
    return Owner("other", os.getpid(), "5", "0a0b", "one")


def test_one_holder(leases):
    with leases.take("a") as lease:
        assert leases.take("a") is None
        assert leases.holder("a").pid == os.getpid()
        assert set(leases.running()) == {"a"}
        with leases.take("b"):
            assert set(leases.running()) == {"a", "b"}
        lease.check()
    assert leases.running() == {} and list(leases.folder.iterdir()) == []
    with pytest.raises(TakenOver):
        lease.check()
    with leases.take("a"):
        pass


def test_an_owner_survives_its_name():
    owner = Owner.this()
    assert Owner.parse(owner.name) == owner and Owner.parse(owner.name).is_gone() is False
    assert "-" not in owner.name and "/" not in owner.name
    for name in ("", "12", "a~b~c~d~e", "a~1~c"):
        assert Owner.parse(name) is None


@pytest.mark.parametrize("change", [{"pid": DEAD}, {"started": "1"}])
def test_of_a_process_that_is_gone(leases, change):
    """At once, however young: also where its number belongs to another process now."""
    hold(leases, "a", replace(Owner.this(), **change))
    assert leases.running() == {}
    with leases.take("a"):
        assert leases.take("a") is None
        assert len(list((leases.folder / "a").iterdir())) == 1


def test_of_a_zombie(leases):
    """A killed process whose parent has not asked for it yet."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        started = leases_module._started(child.pid)
        owner = replace(Owner.this(), pid=child.pid, started=started)
        assert owner.is_gone() is False
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert owner.is_gone() is True
    finally:
        child.kill()
        child.wait()


def test_of_a_process_elsewhere(leases):
    """Its number means nothing here; its heartbeat does."""
    path = hold(leases, "a", elsewhere(), STALE - 30)
    assert leases.take("a") is None and set(leases.running()) == {"a"}
    then = path.stat().st_mtime - 40
    os.utime(path, (then, then))
    assert leases.running() == {}
    with leases.take("a"):
        assert leases.holder("a").pid == os.getpid()


def test_of_nobody(leases):
    """A file that somebody put there counts by its age."""
    folder = leases.folder / "a"
    folder.mkdir(parents=True)
    with leases.take("a"):  # an empty folder is no lease
        pass
    folder.mkdir(parents=True)
    (folder / "note").touch()
    assert leases.take("a") is None and leases.running() == {}
    then = (folder / "note").stat().st_mtime - STALE - 5
    os.utime(folder / "note", (then, then))
    with leases.take("a"):
        pass


def test_the_heartbeat_goes_on(leases, monkeypatch):
    beats, beaten = [], threading.Semaphore(0)
    utime = os.utime

    def noted(path, *rest, **more):
        beats.append(path)
        beaten.release()
        utime(path, *rest, **more)

    monkeypatch.setattr(leases_module, "BEAT", 0.01)
    with leases.take("a") as lease:
        monkeypatch.setattr(os, "utime", noted)
        (path,) = (leases.folder / "a").iterdir()
        for _ in range(3):
            assert beaten.acquire(timeout=60)
        path.unlink()  # somebody took it: the heart does not bring it back
        for _ in range(3):
            assert beaten.acquire(timeout=60)
        assert not path.exists()
        with pytest.raises(TakenOver):
            lease.check()
    assert set(beats) == {path}


def test_a_lost_lease_does_not_end_the_next_one(leases):
    lost = leases.take("a")
    (path,) = (leases.folder / "a").iterdir()
    path.rename(path.with_name(elsewhere().name))
    with pytest.raises(TakenOver):
        lost.check()
    lost.release()
    assert leases.holder("a") == elsewhere()


def test_whoever_looked_first_does_not_take_it_twice(leases, monkeypatch):
    """Both found it stale; the second rename finds another name there."""
    old = hold(leases, "a", replace(Owner.this(), pid=DEAD))
    read = leases._read
    held = []

    def slow(key):
        found = read(key)
        if not held:
            held.append(None)
            held[0] = Leases(leases.folder).take(key)
        return found

    monkeypatch.setattr(leases, "_read", slow)
    assert leases.take("a") is None
    assert isinstance(held[0], Lease) and not old.exists()
    held[0].check()
    held[0].release()


def test_what_was_left_half_made_is_swept(leases):
    leases.folder.mkdir()
    for owner in (replace(Owner.this(), pid=DEAD), Owner.this(), elsewhere()):
        (leases.folder / f".new-a-{owner.name}").mkdir()
    hold(leases, "b", replace(Owner.this(), pid=DEAD))
    hold(leases, "c", elsewhere())
    leases.sweep()
    assert sorted(path.name.partition("-")[0] for path in leases.folder.iterdir()) == [".new", ".new", "c"]
    assert set(leases.running()) == {"c"}


def _race(folder, keys, ready, queue):
    leases, mine = Leases(folder), []
    ready.wait()
    for key in keys:
        lease = leases.take(key)
        if lease is not None:
            mine.append(key)
    queue.put(mine)
    ready.wait()  # nobody dies before all have tried


@pytest.mark.parametrize("are_stale", [False, True])
def test_processes_that_race_get_different_cells(leases, are_stale):
    keys = [f"{i:02}" for i in range(40)]
    if are_stale:
        for key in keys:
            hold(leases, key, replace(Owner.this(), pid=DEAD))
    context = multiprocessing.get_context("fork")
    ready, queue = context.Barrier(4), context.Queue()
    children = [context.Process(target=_race, args=(leases.folder, keys, ready, queue)) for _ in range(4)]
    for child in children:
        child.start()
    taken = [queue.get(timeout=120) for _ in children]
    for child in children:
        child.join()
    assert sorted(key for mine in taken for key in mine) == keys
    assert leases.running() == {}  # all of them are gone


@pytest.mark.parametrize(
    "make", [Path.touch, os.mkfifo, lambda p: p.symlink_to("/nowhere"), lambda p: p.symlink_to("/")]
)
def test_what_is_no_folder_holds_nothing(leases, make):
    leases.folder.mkdir()
    make(leases.folder / "a")
    assert leases.holder("a") is None and leases.running() == {}
    leases.sweep()
    with leases.take("a") as lease:
        lease.check()
        assert leases.take("a") is None
    assert not (leases.folder / "a").exists()


@pytest.mark.parametrize("make", [Path.touch, os.mkfifo, Path.mkdir])
def test_what_strangers_put_into_a_lease_misleads_nobody(leases, make):
    hold(leases, "a", elsewhere())
    make(leases.folder / "a" / ".nfs0001")
    assert leases.holder("a") == elsewhere() and leases.take("a") is None
    hold(leases, "b", elsewhere(), seconds_ago=STALE + 60)
    make(leases.folder / "b" / ".nfs0001")
    with leases.take("b") as lease:
        lease.check()


@pytest.mark.parametrize("seconds", [STALE + 60, 86_400, 10 * 365 * 86_400])
def test_of_the_future(leases, seconds):
    hold(leases, "a", elsewhere(), seconds_ago=-seconds)
    assert leases.holder("a") is None
    with leases.take("a") as lease:
        lease.check()
    hold(leases, "b", elsewhere(), seconds_ago=-60)  # clocks of two machines differ a little
    assert leases.take("b") is None


def test_of_a_process_that_the_system_hides(leases, monkeypatch):
    """As /proc mounted with hidepid does, of processes of other users."""
    owner = replace(Owner.this(), pid=os.getppid(), started="5")
    read = Path.read_text

    def hidden(path, *args, **kwargs):
        if path == Path(f"/proc/{owner.pid}/stat"):
            raise FileNotFoundError(path)
        return read(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", hidden)
    assert owner.is_gone() is None
    hold(leases, "a", owner)
    assert leases.take("a") is None
    hold(leases, "b", owner, seconds_ago=STALE + 60)
    with leases.take("b"):
        pass
    assert replace(owner, pid=DEAD).is_gone() is True
