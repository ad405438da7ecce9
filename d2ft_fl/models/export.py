"""What a finished run leaves for others: whole weights for a library, or an adapter for peft.

Beside its model a run that tuned by LoRA keeps what LoRA tuned:

lora.safetensors   factors and classifier; under ``initial.`` the factors that were taken out of the
                   base weights before the run; under ``change.`` what was added to base weights
lora.json          rank, alpha, targets, rslora, dropout: see :class:`d2ft_fl.lora.config.Lora`

so that a weight W of the model that the run began with ended at

    W + change + scaling * (B A - B0 A0)
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from d2ft_fl.config.run_config import NO_PATHS, resolve_path
from d2ft_fl.errors import ConfigError, first_line
from d2ft_fl.lora.config import Lora, weights, with_lora
from d2ft_fl.lora.peft_export import total_changes, write_adapter
from d2ft_fl.models.build import build_adapter, family_of
from d2ft_fl.models.family import Family
from d2ft_fl.models.spec import ModelSpec
from d2ft_fl.subnets.architecture import Architecture
from d2ft_fl.util.spelling import unknown
from d2ft_fl.util.strict_json import write_json
from d2ft_fl.util.toml import read_toml

ADAPTER_FOLDER = "adapter"  # in the run's folder; whole weights go to one of the library's name
FACTORS_FILE, LORA_FILE = "lora.safetensors", "lora.json"
MODEL_FILES = ("model.safetensors", "model.json")
INITIAL, CHANGE = "initial.", "change."


@dataclass(frozen=True)
class Tuned:
    """What LoRA tuned in a run; see the module's docstring.

    Attributes:
        state: Factors and classifier, by name.
        initial: Factors, by name; empty when none were taken out of the base weights.
        changed: Changes, by weight; empty when base weights stayed.
    """

    lora: Lora
    state: dict[str, Tensor]
    initial: dict[str, Tensor]
    changed: dict[str, Tensor]


def save_tuned(
    folder: Path,
    arch: Architecture,
    lora: Lora,
    state: Mapping[str, Tensor],
    initial: Mapping[str, Tensor] | None = None,
    changed: Mapping[str, Tensor] | None = None,
) -> None:
    """Write what LoRA tuned to a run's folder; of ``state``, factors and classifier are kept.

    Targets are written by name, also where ``lora`` means all.
    """
    tuned_names = [p.name for p in arch.parameters if p.factor or arch.is_classifier(p)]
    tensors = {name: state[name] for name in tuned_names}
    tensors |= {INITIAL + name: tensor for name, tensor in (initial or {}).items()}
    tensors |= {CHANGE + name: tensor for name, tensor in (changed or {}).items()}
    safetensors.torch.save_file(
        {name: t.detach().cpu().contiguous() for name, t in tensors.items()},
        folder / FACTORS_FILE,
    )
    named = replace(lora, targets=lora.targets_in(arch))
    folder.joinpath(LORA_FILE).write_text(write_json(asdict(named), indent=2) + "\n")


def load_tuned(folder: Path) -> Tuned:
    """Read what :func:`save_tuned` wrote; whether the model has the targets is not checked.

    Raises:
        ConfigError: When it cannot be read, or names no targets.
    """
    entries = _read_json(folder / LORA_FILE)
    tensors = _read_tensors(folder / FACTORS_FILE)
    try:
        lora = Lora(
            int(entries["rank"]),
            float(entries["alpha"]),
            tuple(entries["targets"]),
            bool(entries["rslora"]),
            float(entries["dropout"]),
        )
        lora.check_targets()
        if not lora.targets:
            raise ValueError
    except (KeyError, TypeError, ValueError, ConfigError):
        raise _damaged(folder / LORA_FILE) from None
    parts: dict[str, dict[str, Tensor]] = {"": {}, INITIAL: {}, CHANGE: {}}
    for name, tensor in tensors.items():
        prefix = next((p for p in (INITIAL, CHANGE) if name.startswith(p)), "")
        parts[prefix][name.removeprefix(prefix)] = tensor
    return Tuned(lora, parts[""], parts[INITIAL], parts[CHANGE])


def _damaged(path: Path) -> ConfigError:
    """Return the refusal of a file that is to say what LoRA tuned."""
    return ConfigError(f"{str(path)!r} does not say how a run was tuned; run it again")


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        rank: The largest of an adapter; None of whole weights.
        bytes: Of all files.
        load: Lines of Python that load it.
    """

    format: str
    folder: Path
    rank: int | None
    targets: tuple[str, ...]
    bytes: int
    load: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return what ``d2ft export --json`` prints."""
        return {
            "format": self.format,
            "folder": str(self.folder),
            "rank": self.rank,
            "targets": list(self.targets),
            "bytes": self.bytes,
        }


def export_run(run: Path, format: str = "", output: Path | None = None) -> Exported:
    """Write a finished run's result as others load it.

    Args:
        run: The folder of a finished run.
        format: ``peft``, or the library of the run's model (``Family.library``); empty: peft where
            the run was tuned by LoRA, else the library.
        output: A folder that is empty or does not exist; None: one in the run's folder.

    Raises:
        ConfigError: When there is no finished run, it has no such form, or the folder is in use.
    """
    run = run.expanduser().absolute()
    _check_finished(run)
    family = _family(run)
    library = family.library
    if format not in ("", "peft", library):
        raise ConfigError(unknown("--format ", format, ("peft", library)))
    by_lora = any(run.joinpath(name).exists() for name in (FACTORS_FILE, LORA_FILE))
    tuned = load_tuned(run) if by_lora else None
    format = format or (library if tuned is None else "peft")
    if format == "peft" and tuned is None:
        raise ConfigError(
            f"run {str(run)!r} was not tuned by LoRA, so that it has no adapter; use --format "
            f"{library}"
        )
    name = ADAPTER_FOLDER if format == "peft" else library
    folder = (output or run / name).expanduser().absolute()
    export = _Adapter.of(run, tuned) if format == "peft" and tuned else _Model.of(run, family)
    with _written(folder) as part:
        rank = export.write(part)
    return Exported(format, folder, rank, export.targets, _size(folder), export.load(folder))


@contextmanager
def _written(folder: Path) -> Iterator[Path]:
    """Lend a folder to write to, whose files then go to one that is empty or missing.

    Raises:
        ConfigError: When that is neither, or cannot be written to; then nothing is left there.
    """
    option, part = f"--output {str(folder)!r}", None
    try:
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            raise ConfigError(f"{option} is not an empty folder; name another, or remove it")
        folder.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=".part-", dir=folder))
        yield part
        for path in part.iterdir():
            path.replace(folder / path.name)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ConfigError(f"{option} cannot be written to: {reason}; name another") from None
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)


def base_model(run: Path | str) -> nn.Module:
    """Build the model that a run began with: what the run's adapter is an adapter of.

    Raises:
        ConfigError: When the run cannot be read, or its weights cannot be had any more.
    """
    return build_adapter(_spec(Path(run))).model


@dataclass(frozen=True)
class _Adapter:
    """What LoRA tuned in a run, read and checked, to be written as peft's adapter."""

    run: Path
    spec: ModelSpec
    arch: Architecture
    tuned: Tuned
    state: dict[str, Tensor]

    @classmethod
    def of(cls, run: Path, tuned: Tuned) -> "_Adapter":
        spec = _spec(run)
        bare = ModelSpec(**{**vars(spec), "pretrained": "none"})
        whole = build_adapter(bare).describe()
        try:
            arch = with_lora(whole, tuned.lora)
        except ConfigError:  # speaks of options, which nobody gave
            raise _damaged(run / LORA_FILE) from None
        factors = {p.name: p.shape for p in arch.parameters if p.factor}
        head = {p.name: p.shape for p in arch.parameters if arch.is_classifier(p)}
        known = {p.name: p.shape for p in weights(arch)}
        if not (
            _shapes(tuned.state) == factors | head
            and _shapes(tuned.initial) in (factors, {})
            and _shapes(tuned.changed).items() <= known.items()
        ):
            raise ConfigError(
                f"{str(run / FACTORS_FILE)!r} does not hold what {LORA_FILE!r} says that LoRA "
                "tuned; run it again"
            )
        state = tuned.state
        if tuned.changed:
            state = _read_tensors(run / MODEL_FILES[0]) | state
        return cls(run, spec, arch, tuned, state)

    @property
    def targets(self) -> tuple[str, ...]:
        """The products that it adapts."""
        return self.tuned.lora.targets_in(self.arch)

    def write(self, folder: Path) -> int:
        """Write it, and return its largest rank."""
        t, spec = self.tuned, self.spec
        changes = total_changes(self.arch, t.state, t.initial, t.changed) if t.changed else None
        base = spec.name if spec.pretrained in NO_PATHS["pretrained"] else spec.pretrained
        return write_adapter(folder, self.arch, t.lora, self.state, t.initial, base, changes)

    def load(self, folder: Path) -> tuple[str, str]:
        """Return two lines that load it, without this project where others have the weights."""
        if self.spec.pretrained == "hub":
            source, made = family_of(self.spec.name).create(self.spec)
        else:
            source = "from d2ft_fl import base_model"
            made = f"base_model({str(self.run)!r})"
        return (
            f"{source}; from peft import PeftModel",
            f"model = PeftModel.from_pretrained({made}, {str(folder)!r})",
        )


@dataclass(frozen=True)
class _Model:
    """A run's whole weights, read and checked, to be written for the model's library."""

    run: Path
    family: Family
    targets: tuple[str, ...] = ()

    @classmethod
    def of(cls, run: Path, family: Family) -> "_Model":
        _spec(run)
        _read_tensors(run / MODEL_FILES[0])
        return cls(run, family)

    def write(self, folder: Path) -> None:
        """Write it."""
        for name in MODEL_FILES:
            shutil.copyfile(self.run / name, folder / name)

    def load(self, folder: Path) -> tuple[str, ...]:
        """Return lines that load it."""
        return self.family.load(folder)


def _check_finished(run: Path) -> None:
    """Raise ConfigError unless a folder holds a run that ended well."""
    if not run.is_dir():
        raise ConfigError(
            f"run {str(run)!r} is not a folder; name the run folder that `d2ft run` printed"
        )
    if not run.joinpath("status.json").is_file():
        raise ConfigError(
            f"run {str(run)!r} holds no run: it lacks 'status.json'; name the run folder that "
            "`d2ft run` printed"
        )
    status = _read_json(run / "status.json")
    if status.get("status") != "finished":
        reason = f" ({status['reason']})" if status.get("reason") else ""
        raise ConfigError(
            f"run {str(run)!r} is not finished: its status is {status.get('status')!r}{reason}; "
            "export one that is finished"
        )
    for name in ("config.toml", *MODEL_FILES):
        if not run.joinpath(name).is_file():
            raise ConfigError(f"run {str(run)!r} lacks {name!r}; run it again")


def _family(run: Path) -> Family:
    """Return the family of a run's model."""
    options = read_toml(run / "config.toml")
    try:
        return family_of(options["model"])
    except KeyError as error:
        raise ConfigError(f"run {str(run)!r} does not say its {error}; run it again") from None


def _spec(run: Path) -> ModelSpec:
    """Return how to build the model that a run began with, without opening its data."""
    options = read_toml(run / "config.toml")
    entries = _read_json(run / MODEL_FILES[1])
    try:
        name, pretrained, seed = options["model"], options["pretrained"], options["seed"]
        arguments, classes = family_of(name).read(entries)
    except KeyError as error:
        raise ConfigError(f"run {str(run)!r} does not say its {error}; run it again") from None
    except (TypeError, ValueError):
        raise ConfigError(
            f"{str(run / MODEL_FILES[1])!r} does not say how the model is built; run it again"
        ) from None
    if pretrained not in NO_PATHS["pretrained"]:
        pretrained = str(resolve_path(pretrained))
    return ModelSpec(name, tuple(arguments.items()), pretrained, 0, classes, seed)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{str(path)!r} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{str(path)!r} is not JSON: {error}") from None
    if not isinstance(entries, dict):
        raise ConfigError(f"{str(path)!r} is not a JSON object")
    return entries


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise ConfigError(f"{str(path)!r} does not exist; run it again") from None
    except (SafetensorError, OSError) as error:
        text = first_line(error)
        raise ConfigError(f"{str(path)!r} is not safetensors: {text}") from None


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
