"""With what a run is made: versions of packages, the machine, and the commit of the code."""

import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import torch

OURS = "d2ft-fl"
PACKAGES = (OURS, "torch", "flwr", "timm", "peft", "numpy")
GIT_TIMEOUT = 10.0  # seconds


def versions(device: str = "cpu") -> dict[str, Any]:
    """Find out what decides how this process computes, as JSON.

    Args:
        device: Where clients train, ``cpu`` or ``cuda``.
    """
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "system": platform.system(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
    }
    return found | commit(code_folder())


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def code_folder() -> Path | None:
    """Find the git checkout that the code comes from; None where there is none.

    Flower runs a copy without git; its original is the one that an editable installation names, if
    that has the same code.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent, _installed_from()):
        if (
            folder
            and folder.joinpath(".git").exists()
            and same_code(package, folder / package.name)
        ):
            return folder
    return None


def same_code(ours: Path, theirs: Path) -> bool:
    """Tell whether every module of a package is, byte for byte, in another folder too."""
    if ours == theirs:
        return True
    try:
        return all(
            path.read_bytes() == theirs.joinpath(path.relative_to(ours)).read_bytes()
            for path in ours.rglob("*.py")
        )
    except OSError:
        return False


def _installed_from() -> Path | None:
    try:
        text = metadata.distribution(OURS).read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return None
    address = urlparse(json.loads(text)["url"]) if text else None
    return Path(unquote(address.path)) if address and address.scheme == "file" else None


def commit(folder: Path | None) -> dict[str, Any]:
    """Return a checkout's commit, and whether tracked files differ from it; None without git."""
    name = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no") if name else None
    return {"commit": name, "changed": None if changes is None else bool(changes)}


def _git(folder: Path | None, *arguments: str) -> str | None:
    if folder is None:
        return None
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=folder, capture_output=True, text=True, check=True, timeout=GIT_TIMEOUT,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
