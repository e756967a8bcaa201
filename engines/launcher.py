"""`antiphon engine`: one SGLang server with our linker in this process, registered in the ledger.

Run as `python -m antiphon.engines.launcher`: SGLang's children are spawned and import this module again, and
its last lines are where they get what they lack on a CPU. When this process dies, however it dies, its
children die with it; SIGTERM and SIGINT take its record out of the ledger first.
"""

from __future__ import annotations

import ctypes
import json
import logging
import multiprocessing.resource_tracker
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import urllib.request
import uuid
from pathlib import Path
from typing import Any, NoReturn

from antiphon.engines.fleet_secrets import engine_http_key
from antiphon.engines.launch_options import (
    EngineOptions,
    LaunchError,
    check_installed,
    check_port_free,
    find_free_ports,
    parse_options,
    read_model_config,
    sglang_arguments,
)

log = logging.getLogger("antiphon.engine")

SHIMS_VARIABLE = "ANTIPHON_CPU_SHIMS"
"""Set by the launcher for its children, so that all of them decide alike."""
PARENT_VARIABLE = "ANTIPHON_LAUNCHER_PID"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
SGLANG_LOGS_ARGUMENTS = "sglang.srt.entrypoints.engine"
WARM_UP_DEADLINE_S = 300.0
CHILD_EXIT_DEADLINE_S = 5.0


def run_engine(options: EngineOptions) -> NoReturn:
    """Check what can be checked at once (raises `LaunchError`), then become the launcher process."""
    check(options)
    os.execv(sys.executable, [sys.executable, "-m", "antiphon.engines.launcher", *options.arguments()])


def check(options: EngineOptions) -> dict[str, Any]:
    """Everything that can be wrong before SGLang is loaded; the model's config. Raises `LaunchError`."""
    check_installed(options.linker)
    config = read_model_config(options.model)
    check_port_free(options.host, options.port, "--port")
    _fleet_key(options)
    if options.linker:
        for port in range(options.kv_port, options.kv_port + options.ranks) if options.kv_port else ():
            check_port_free(options.host, port, "--kv-port")
    return config


def prebuild_page_hash() -> None:
    """Compile SGLang's page-hash extension now, once per machine (about 13 s): else its first prompt would.

    Raises `LaunchError` where it cannot be built. On a CPU `cpu_shims` puts a twin in its place.
    """
    from sglang.srt.mem_cache.cpp_utils import native_hash

    try:
        native_hash._load_native_hash_module()
    except RuntimeError as error:
        raise LaunchError(
            f"SGLang's page hash cannot be compiled ({error.__cause__ or error}): "
            "install g++, ninja and the OpenSSL headers (Debian: g++ ninja-build libssl-dev)"
        ) from error


def _fleet_key(options: EngineOptions) -> bytes:
    """b"" where none is needed; raises `LaunchError` when it is and there is none."""
    from antiphon.engines.handshake import load_fleet_key

    try:
        return load_fleet_key(path=options.key_file)
    except ValueError as error:
        if not options.linker and not options.ledger:
            return b""
        raise LaunchError(str(error)) from error


def main(arguments: list[str] | None = None) -> int:
    """Serve until stopped. Returns the exit status of a start that failed; a stop ends the process."""
    # Before any thread exists: all of them inherit the mask, so that only `_await_stop` sees these signals.
    # multiprocessing's tracker unblocks them when it starts, so it starts first.
    multiprocessing.resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    try:
        options = parse_options(sys.argv[1:] if arguments is None else arguments)
        EngineProcess(options, check(options)).serve()
    except LaunchError as error:
        print(f"antiphon engine: {error}", file=sys.stderr)
        return 2
    return 0


class EngineProcess:
    """This process, from the checks to the last signal."""

    def __init__(self, options: EngineOptions, config: dict[str, Any]) -> None:
        self.options = options
        self.incarnation = uuid.uuid4().hex
        self.kv_port = options.kv_port or find_free_ports(options.host, options.ranks)
        self._config = config
        self._fleet_key = _fleet_key(options)
        self._http_key = ""
        if self._fleet_key and options.takes_fleet_http_key:
            self._http_key = engine_http_key(self._fleet_key)
        self._scratch = tempfile.mkdtemp(prefix="antiphon-engine-")
        self._registration: Any = None
        self._lock = threading.Lock()
        self._stopping = False

    @property
    def url(self) -> str:
        return f"http://{self.options.host}:{self.options.port}"

    def serve(self) -> None:
        """Run SGLang's server in this thread until it ends."""
        tempfile.tempdir = self._scratch  # SGLang never removes the files of its sockets
        threading.Thread(target=self._await_stop, name="antiphon-stop", daemon=True).start()
        on_cpu = self._prepare_device()
        from sglang.srt.entrypoints.http_server import launch_server
        from sglang.srt.server_args import prepare_server_args

        words = sglang_arguments(
            self.options,
            on_cpu=on_cpu,
            config=self._config,
            kv_port=self.kv_port,
            incarnation=self.incarnation,
            http_key=self._http_key,
        )
        logging.getLogger(SGLANG_LOGS_ARGUMENTS).addFilter(Masked(self._http_key))
        server_args = prepare_server_args(words)
        server_args.resolve_once()
        try:
            launch_server(server_args, launch_callback=self._announce)
        finally:
            self.stop(1)

    def _prepare_device(self) -> bool:
        """Whether this engine runs on the CPU; if so, everything that this needs is done."""
        # One computing thread a process unless the user says else: engines and gateway share the cores.
        defaults = {
            "TOKENIZERS_PARALLELISM": "false",
            # /health answers at once instead of generating for a second; /health_generate still does.
            "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "false",
        }
        os.environ[PARENT_VARIABLE] = str(os.getpid())
        from antiphon.engines import cpu_shims

        on_cpu = self.options.flag("--device") == "cpu"
        if not on_cpu:
            on_cpu = self.options.flag("--device") is None and not cpu_shims.has_gpu()
        if on_cpu:
            defaults["OMP_NUM_THREADS"] = "1"
            os.environ[SHIMS_VARIABLE] = "1"
        else:
            os.environ.pop(SHIMS_VARIABLE, None)
        for name, value in defaults.items():
            os.environ.setdefault(name, value)
        if on_cpu:
            cpu_shims.apply()
            import torch

            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        elif self.options.linker:
            prebuild_page_hash()
        return on_cpu

    def _announce(self) -> None:
        """SGLang's callback when it serves: warm our own path up, then tell the ledger."""
        try:
            self._warm_up()
            if self.options.ledger:
                self._register()
            log.info("engine %s serves %s at %s", self.options.resolved_id, self.options.model_id, self.url)
        except Exception:
            log.exception("engine %s could not be announced; stopping", self.options.resolved_id)
            self.stop(1)

    def _warm_up(self) -> None:
        """A prompt of several pages: the first page hash, offload and decode are slower than all others."""
        page = int(self._ask("/server_info").get("page_size") or 1)
        length = min(4 * page + 1, int(self._config.get("max_position_embeddings") or 64) // 2)
        prompt = {"input_ids": [1] * length, "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}
        self._ask("/generate", prompt)

    def _register(self) -> None:
        from antiphon.engines.base import EngineRecord
        from antiphon.engines.registry import Registration

        info = self._ask("/server_info")
        options = self.options
        record = EngineRecord(
            engine_id=options.resolved_id,
            url=f"http://{options.advertise}" if options.advertise else self.url,
            pool=options.pool,
            incarnation=self.incarnation,
            kv_addresses=self._kv_addresses(),
            model_id=options.model_id,
            model_path=str(Path(options.model).resolve()) if Path(options.model).is_dir() else "",
            chunk_tokens=max(int(info.get("chunked_prefill_size") or 0), 0),
            decode_interval=int(info.get("prefill_decode_interval") or 0),
            deterministic=bool(info.get("enable_deterministic_inference")),
        )
        with self._lock:
            if self._stopping:
                return
            self._registration = Registration(
                options.ledger,
                record,
                fleet=options.fleet,
                replace=options.replace,
                on_taken=self._stop_replaced,
                fleet_key=self._fleet_key,
            )
            self._registration.start()

    def _kv_addresses(self) -> tuple[str, ...]:
        """Where others reach the directories of its ranks."""
        options = self.options
        if not options.linker:
            return ()
        if options.advertise_kv:
            return (options.advertise_kv,)
        return tuple(f"{options.host}:{self.kv_port + rank}" for rank in range(options.ranks))

    def _stop_replaced(self, holder: str) -> None:
        """From the registry's own thread, which `stop` waits for: hence one more thread."""
        log.error("engine id %s went to incarnation %s; stopping", self.options.resolved_id, holder)
        threading.Thread(target=self.stop, args=(1,), name="antiphon-replaced", daemon=True).start()

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """JSON of our own server; raises OSError."""
        key = self._http_key or self.options.flag("--api-key")
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers=headers)
        with urllib.request.urlopen(request, timeout=WARM_UP_DEADLINE_S) as response:
            answer: dict[str, Any] = json.load(response)
        return answer

    def _await_stop(self) -> None:
        received = signal.sigwait(STOP_SIGNALS)
        log.info("%s: engine %s stops", signal.Signals(received).name, self.options.resolved_id)
        self.stop(0)

    def stop(self, status: int) -> NoReturn:
        """Leave the ledger, end every child and this process; the first caller's status counts."""
        with self._lock:
            first, self._stopping = not self._stopping, True
        if not first:
            threading.Event().wait()  # whoever came first ends us
        if self._registration is not None:
            self._registration.close()
        end_children()
        shutil.rmtree(self._scratch, ignore_errors=True)
        logging.shutdown()
        os._exit(status)


class Masked(logging.Filter):
    """Takes a secret out of log lines: SGLang logs all of its arguments when it starts."""

    def __init__(self, secret: str) -> None:
        super().__init__()
        self._secret = secret

    def filter(self, record: logging.LogRecord) -> bool:
        if self._secret and self._secret in (text := record.getMessage()):
            record.msg, record.args = text.replace(self._secret, "***"), ()
        return True


def end_children() -> None:
    """SIGKILL this process's children and wait until they are gone (their memory and ports with them)."""
    children = [
        int(child)
        for task in Path("/proc/self/task").iterdir()
        for child in (task / "children").read_text().split()
    ]
    for child in children:
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            continue
    deadline = time.monotonic() + CHILD_EXIT_DEADLINE_S
    for child in children:
        while time.monotonic() < deadline:
            try:
                if os.waitpid(child, os.WNOHANG)[0]:
                    break
            except ChildProcessError:
                break
            time.sleep(0.01)


def prepare_child() -> None:
    """What each of SGLang's processes needs before SGLang is imported in it."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    die_with_parent()
    if os.environ.get(SHIMS_VARIABLE) == "1":
        from antiphon.engines import cpu_shims

        cpu_shims.apply()


def die_with_parent() -> None:
    """Have the kernel kill us when our parent dies. SGLang asks for it too, but only after its imports."""
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    launcher = int(os.environ[PARENT_VARIABLE])
    try:
        # A killed launcher that nobody has reaped yet still has its pid: its state tells.
        dead = Path(f"/proc/{launcher}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        dead = True
    if dead:
        os._exit(1)  # it died before we asked


if __name__ == "__mp_main__":
    prepare_child()
elif __name__ == "__main__":
    sys.exit(main())
