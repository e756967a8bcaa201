"""The fleet key: what scheduler and engines prove to each other when they connect. Never on the wire."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

from antiphon.scheduler.errors import UserError

KEY_VARIABLE = "ANTIPHON_FLEET_KEY"
KEY_FILE = "fleet.key"
MIN_KEY_CHARS = 16


def load_or_create_fleet_key(
    state_dir: Path, key_file: Path | None = None, env: Mapping[str, str] = os.environ
) -> bytes:
    """ANTIPHON_FLEET_KEY, else the key file, which is made with mode 0600 on first use.

    Two processes that start at once get the same key. Raises `UserError` for a key that is too short, or a
    file that others may read.
    """
    if key := env.get(KEY_VARIABLE):
        return _checked(key, f"the environment variable {KEY_VARIABLE}")
    path = key_file or state_dir / KEY_FILE
    try:
        if not path.exists():
            _create(path)
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            raise UserError(f"{path}: others may read this key (mode {mode:04o}); run chmod 600 on it")
        return _checked(path.read_text(encoding="ascii").strip(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the fleet key cannot be read or made: {error}") from error


def _create(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32) + "\n")
        os.link(draft, path)  # whole or not at all, and never over another process's key
    except FileExistsError:
        pass
    finally:
        draft.unlink()


def _checked(key: str, where: str) -> bytes:
    if len(key) < MIN_KEY_CHARS:
        raise UserError(f"{where}: a fleet key has at least {MIN_KEY_CHARS} characters, this one {len(key)}")
    return key.encode()
