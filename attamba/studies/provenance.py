"""What a result was made with: code, versions, device."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import attamba

PACKAGE = Path(attamba.__file__).parent


def code_version() -> dict[str, Any]:
    """version of the package, source (SHA-256 over its .py files), and where it lies in a git
    checkout commit and dirty (were there changes besides?).
    """
    version: dict[str, Any] = {"version": attamba.__version__, "source": source_digest(PACKAGE)}
    commit = _git("rev-parse", "HEAD")
    if commit is not None:
        version["commit"] = commit
        version["dirty"] = bool(_git("status", "--porcelain", "--", str(PACKAGE)))
    return version


def source_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of all .py files; the same wherever they are."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def environment(device: Any) -> dict[str, Any]:
    """Versions, the device's name and the date (UTC). device: a torch.device."""
    import torch

    from attamba.bench.common import device_name

    record = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        record["cuda"] = torch.version.cuda
        record["triton"] = _triton()
    return record


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _git(*arguments: str) -> str | None:
    """What git says about the package's folder; None where it is no checkout of this project."""
    if not (PACKAGE.parent / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(PACKAGE.parent), *arguments],
            capture_output=True,
            text=True,
            timeout=60,
        )
    except OSError:  # git is not installed
        return None
    return done.stdout.strip() if done.returncode == 0 else None
