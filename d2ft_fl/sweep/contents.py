"""What a configuration names beside itself, by content: a trial of other files is another trial."""

import hashlib
import importlib.util
from functools import lru_cache
from pathlib import Path

from d2ft_fl.config.run_config import NO_PATHS, RunConfig, resolve_path


def contents(config: RunConfig) -> dict[str, str]:
    """Return digests of the files and plug-ins that options name, by what names them.

    Of a plug-in it is its own file, of a folder the content of its files; of a folder of data their
    names and sizes, as data can be too much to read. What is not there is left out: whatever needs
    it will say so.
    """
    paths = [config.lora_adapter]
    if config.pretrained not in NO_PATHS["pretrained"]:
        paths.append(config.pretrained)
    if config.budgets.endswith(".toml"):
        paths.append(config.budgets)
    modules = [name for name in (config.strategy, config.tuning) if "." in name]
    for name in (config.budgets, *config.trackers.split(",")):
        if ":" in name:
            modules.append(name.strip().split(":")[0])
    digests = {name: _file(resolve_path(name)) for name in paths if name}
    digests |= {name: _module(name) for name in modules}
    if config.dataset not in NO_PATHS["dataset"]:
        digests[config.dataset] = _listing(resolve_path(config.dataset))
    return {name: digest for name, digest in digests.items() if digest}


@lru_cache(maxsize=256)
def _file(path: Path) -> str:
    """Digest a file, or all files in a folder."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    try:
        for each in files:
            with each.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    except OSError:
        return ""
    return digest.hexdigest() if files else ""


@lru_cache(maxsize=256)
def _module(name: str) -> str:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return ""
    return _file(Path(spec.origin)) if spec and spec.origin else ""


@lru_cache(maxsize=256)
def _listing(path: Path) -> str:
    if not path.is_dir():
        return ""
    files = [(str(p.relative_to(path)), p.stat().st_size) for p in path.rglob("*") if p.is_file()]
    files.sort()
    return hashlib.sha256(repr(files).encode()).hexdigest()
