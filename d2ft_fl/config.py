"""The configuration of a run: one typed record, checked before anything starts.

Each field is one key of ``[tool.flwr.app.config]`` in ``pyproject.toml``, with ``-`` for ``_``;
the defaults there and here are the same, which a test holds.
"""

import difflib
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2ft_fl import scores
from d2ft_fl.adapters import read_adapter
from d2ft_fl.budgets import BudgetSource, ClientDescription, budget_source
from d2ft_fl.errors import ConfigError, UnkeptBudget
from d2ft_fl.factors import MIXED, MODES
from d2ft_fl.initial import INITS
from d2ft_fl.local_options import PRECISIONS, LocalOptions
from d2ft_fl.lora import Lora
from d2ft_fl.match import MATCHES
from d2ft_fl.meter import DEVICES, usable_device
from d2ft_fl.methods import load_strategy, method_of
from d2ft_fl.planner import COUPLINGS, PLANNERS
from d2ft_fl.plugins import load_module
from d2ft_fl.privacy import Privacy
from d2ft_fl.server_optimizer import ADAPTIVE, SERVER_OPTIMIZERS, ServerOptimizer
from d2ft_fl.specs import EMBEDDED, HUB, DataSpec, ModelSpec
from d2ft_fl.subnets import Architecture
from d2ft_fl.trackers import Factory, load_trackers

TUNINGS = ("full", "lora")
SELECTIONS = ("random", "entropy")
AGGREGATIONS = ("mean", "trimmed-mean", "median", "mean-around-median")
TRANSPORTS = ("shared", "message")
FEW_REPLIES = ("stop", "repeat")
# Values of options with paths that are none.
BUILTIN = {
    "dataset": EMBEDDED,
    "pretrained": ("bundled", "hub", "none"),
    "run-folder": ("",),
    "resume": ("",),
    "lora-adapter": ("",),
}


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run. See ``pyproject.toml`` for what each key means."""

    strategy: str = "d2ft"
    rounds: int = 10
    clients: int = 10
    sample_clients: int = 0
    seed: int = 0

    dataset: str = "digits"
    label_column: str = "label"
    partitioner: str = "Dirichlet"
    partitioner_args: str = "alpha = 0.5"
    train_examples: int = 0
    test_examples: int = 0
    data_share: float = 1.0
    data_selection: str = "random"
    selection_temperature: float = 0.1

    model: str = "vit_glyphs"
    model_args: str = ""
    pretrained: str = "bundled"
    image_size: int = 0

    tuning: str = "full"
    lora_rank: int = 8
    lora_ranks: str = ""
    lora_rank_exponent: float = 0.5
    lora_alpha: float = 8.0
    lora_targets: str = "qkv, proj, fc1, fc2"
    lora_dropout: float = 0.0
    lora_rslora: bool = False
    lora_init: str = "lora"
    lora_aggregation: str = "factors"
    lora_error: bool = True
    lora_adapter: str = ""
    lora_lr: float = 2e-3
    slora_rounds: int = 0
    batch_size: int = 16
    epochs: int = 1
    optimizer: str = "adamw"
    lr: float = 5e-4
    head_lr: float = 2e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    precision: str = "fp32"
    checkpointing: bool = False
    accumulate: int = 1
    proximal: float = 0.0
    compensation: bool = False
    aggregation: str = "mean"
    trim_share: float = 0.2
    clip_norm: float = 0.0
    noise_multiplier: float = 0.0
    epsilon: float = 0.0
    delta: float = 1e-5
    noise_seed: int = -1
    hostile_share: float = 0.0
    hostile_scale: float = -10.0
    server_optimizer: str = "mean"
    server_lr: float = 1.0
    server_momentum: float = 0.9
    server_second_momentum: float = 0.99
    server_tau: float = 1e-3

    budgets: str = "devices"
    match: str = ""
    match_share: float = 0.0
    stage_rounds: int = 0
    planner: str = "joint"
    slots: int = 1
    backward_score: str = "fisher"
    forward_score: str = "fisher"
    forward_weight: float = 1.0
    frozen_weight: float = 0.0
    coupling: str = "none"
    spread_clients: float = 0.1
    least_clients: int = 1
    agenda_rounds: int = 4
    exploration: float = 1.0
    score_every: int = 5
    score_examples: int = 4
    score_momentum: float = 0.5

    device: str = "cpu"
    threads_per_client: int = 1
    eval_batch_size: int = 128
    eval_every: int = 1
    transport: str = "shared"
    round_timeout: float = 3600.0
    client_timeout: float = 0.0
    min_replies: int = 1
    few_replies: str = "stop"
    attempts: int = 3
    checkpoint_every: int = 1
    resume: str = ""
    verify_costs: bool = False
    trackers: str = ""
    run_folder: str = ""

    # -- reading -----------------------------------------------------------------------------

    @classmethod
    def from_mapping(cls, entries: Mapping[str, Any]) -> "RunConfig":
        """A configuration from keys as they stand in TOML.

        Raises:
            ConfigError: For an unknown key (with the nearest known one) or a wrong type.
        """
        types = {f.name.replace("_", "-"): f.type for f in fields(cls)}
        values: dict[str, Any] = {}
        for key, value in entries.items():
            if key not in types:
                raise ConfigError(f"unknown option {key!r}; {nearest(key, types)}")
            values[key.replace("-", "_")] = _typed(key, value, types[key])
        return cls(**values)

    def to_mapping(self) -> dict[str, Any]:
        """Keys as they stand in TOML."""
        return {key.replace("_", "-"): value for key, value in asdict(self).items()}

    # -- checking ----------------------------------------------------------------------------

    def check(self) -> "RunConfig":
        """This configuration, once everything it names is known to exist and to fit together.

        Raises:
            ConfigError: In one line, what to write instead.
        """
        # They take seconds to import, and options need neither.
        from d2ft_fl import timm_vit
        from d2ft_fl.data import open_data
        from d2ft_fl.models import build_model

        self.check_options()
        self.torch_device()
        model = build_model(self.model_spec())
        channels, side = timm_vit.input_shape(model)
        arch = timm_vit.describe(model)
        if self.tuning == "lora":
            self._check_lora(arch)
        partitions = open_data(self.data_spec(side, channels)).partitions
        self._check_budgets(arch, [len(own) for own in partitions])
        return self

    def _check_budgets(self, arch: Architecture, examples: list[int]) -> None:
        """Raises ConfigError unless clients' first budgets are there, and can be matched."""
        from d2ft_fl.federation import Federation, Report, State  # which know this module

        source = self.budget_source()
        asked = examples if self.match else examples[:1]
        reports = [
            Report(client, count, source(ClientDescription(client, count, len(examples)), 1))
            for client, count in enumerate(asked)
        ]
        Federation(self, arch).at(1).participants(reports, State(0, {}))

    def _check_lora(self, arch: Architecture) -> None:
        """Raises ConfigError unless LoRA's options fit the model, and an adapter fits them."""
        self.lora().check(arch)
        if self.lora_adapter:
            self.adapter(arch)

    def adapter(self, arch: Architecture) -> dict[str, Tensor]:
        """The factors that a run begins with, and the adapter's classifier where it fits.

        Args:
            arch: Of the model, without factors.

        Raises:
            ConfigError: When there are none, or they are others than the run's.
        """
        lora = self.lora()
        found, tensors = read_adapter(resolve_path(self.lora_adapter), arch)
        if replace(found, dropout=lora.dropout, targets=()) != replace(lora, targets=()) or set(
            found.targets
        ) != set(lora.targets):
            raise ConfigError(
                f"lora-adapter = {self.lora_adapter!r} has other factors than the run: set "
                f"lora-rank={found.rank} lora-alpha={found.alpha} "
                f"lora-rslora={str(found.rslora).lower()} lora-targets={', '.join(found.targets)!r}"
            )
        return tensors

    def check_options(self) -> "RunConfig":
        """This configuration, once all but its model, data and machine is known to fit together.

        Raises:
            ConfigError: In one line, what to write instead.
        """
        for key in (
            "rounds",
            "clients",
            "batch-size",
            "epochs",
            "slots",
            "threads-per-client",
            "accumulate",
            "agenda-rounds",
            "eval-batch-size",
            "eval-every",
            "attempts",
        ):
            self._at_least(key, 1)
        for key in (
            "train-examples",
            "test-examples",
            "image-size",
            "score-every",
            "score-examples",
            "least-clients",
            "stage-rounds",
            "seed",
            "sample-clients",
            "min-replies",
            "checkpoint-every",
        ):
            self._at_least(key, 0)
        self._one_of("transport", TRANSPORTS)
        self._one_of("few-replies", FEW_REPLIES)
        if self.sample_clients > self.clients:
            raise ConfigError(
                f"sample-clients = {self.sample_clients} is more than clients = {self.clients}; "
                "0 takes all"
            )
        there = self.sample_clients or self.clients
        if self.min_replies > there:
            raise ConfigError(
                f"min-replies = {self.min_replies} is more than the {there} clients that take part "
                "in a round"
            )
        self._one_of("optimizer", ("adamw", "sgd"))
        self._one_of("precision", PRECISIONS)
        self._one_of("device", DEVICES)
        self._one_of("planner", PLANNERS)
        self._one_of("coupling", COUPLINGS)
        self._one_of("backward-score", scores.KINDS)
        self._one_of("forward-score", scores.KINDS)
        if not 0 <= self.exploration <= 1:
            raise ConfigError(f"exploration = {self.exploration} must lie between 0 and 1")
        if not 0 <= self.score_momentum < 1:
            raise ConfigError(
                f"score-momentum = {self.score_momentum} must be 0 or more, and below 1"
            )
        if not 0 < self.round_timeout < float("inf"):
            raise ConfigError(f"round-timeout = {self.round_timeout} must be above 0 seconds")
        if self.seed >= 2**63:
            raise ConfigError(f"seed = {self.seed} must be below 2**63")
        if not 0 < self.spread_clients < float("inf"):
            raise ConfigError(f"spread-clients = {self.spread_clients} must be a share above 0")
        if self.planner == "two-stage" and (self.frozen_weight or self.coupling == "spread"):
            raise ConfigError(
                "planner = 'two-stage' has D2FT's three operations and no coupling: leave "
                "frozen-weight at 0 and coupling at 'none' or 'agenda', or use planner = 'joint'"
            )
        for key in (
            "lr",
            "head-lr",
            "lora-lr",
            "lora-rank-exponent",
            "momentum",
            "weight-decay",
            "proximal",
            "client-timeout",
            "clip-norm",
            "noise-multiplier",
            "epsilon",
            "server-lr",
            "forward-weight",
            "frozen-weight",
        ):
            value = self.to_mapping()[key]
            if not 0 <= value < float("inf"):
                raise ConfigError(f"{key} = {value} must be a finite number, 0 or more")
        if self.slots > self.batch_size:
            raise ConfigError(
                f"slots = {self.slots} is more than batch-size = {self.batch_size}; a slot "
                f"needs an example, so ask for at most {self.batch_size} slots"
            )
        if self.compensation and self.score_every == 0:
            raise ConfigError(
                "compensation needs rounds in which clients measure: set score-every to 1 or more"
            )
        no_pass = self.score_every == 0 or self.score_examples == 0
        if no_pass and (measured := self.measured_scores()):
            raise ConfigError(
                f"{' and '.join(measured)} scores need a scoring pass: set score-every and "
                "score-examples to 1 or more, or use magnitude or uniform scores"
            )
        self.load_strategy()
        self._check_data()
        self._check_match()
        self._check_tuning()
        self._check_server()
        self._check_robust()
        self.privacy()
        self.budget_source()
        self.load_trackers()
        return self

    def _check_data(self) -> None:
        """Raises ConfigError unless clients can choose their examples as configured."""
        self._one_of("data-selection", SELECTIONS)
        if not 0 < self.data_share <= 1:
            raise ConfigError(f"data-share = {self.data_share} must be above 0, and 1 at most")
        if not 0 < self.selection_temperature < float("inf"):
            raise ConfigError(
                f"selection-temperature = {self.selection_temperature} must be a number above 0"
            )

    def _check_match(self) -> None:
        """Raises ConfigError unless the strategy keeps the budget that is matched."""
        if self.match:
            self._one_of("match", tuple(MATCHES))
        if not 0 <= self.match_share <= 1:
            raise ConfigError(f"match-share = {self.match_share} must lie between 0 and 1")
        if self.match_share and not self.match:
            raise ConfigError(
                f"match-share = {self.match_share} belongs to match: set that to one of "
                f"{', '.join(MATCHES)}"
            )
        keeps = method_of(self.load_strategy(), self.strategy).keeps
        if lost := [r for r in MATCHES.get(self.match, ()) if r not in keeps]:
            raise UnkeptBudget(
                f"strategy = {self.strategy!r} cannot keep a budget of {' and '.join(lost)}, which "
                f"match = {self.match!r} gives every client: leave match empty to run it as a "
                "reference, or take another strategy"
            )

    def _check_server(self) -> None:
        """Raises ConfigError unless the server's optimiser fits the rest."""
        self._one_of("server-optimizer", SERVER_OPTIMIZERS)
        for key in ("server-momentum", "server-second-momentum"):
            value = self.to_mapping()[key]
            if not 0 <= value < 1:
                raise ConfigError(f"{key} = {value} must be 0 or more, and below 1")
        if not 0 < self.server_tau < float("inf"):
            raise ConfigError(f"server-tau = {self.server_tau} must be a number above 0")
        if self.server_optimizer in ADAPTIVE and self.server_lr >= 1:
            raise ConfigError(
                f"server-lr = {self.server_lr} moves every weight by about that much in the first "
                f"rounds of server-optimizer = {self.server_optimizer!r}; set it to 0.01 or so"
            )
        if self.server_optimizer == "mean" and self.server_lr != 1:
            raise ConfigError(
                f"server-lr = {self.server_lr} belongs to an optimiser: set server-optimizer to "
                f"one of {', '.join(SERVER_OPTIMIZERS[1:])}"
            )
        exact = self.lora_aggregation in MIXED
        if self.tuning == "lora" and exact and self.server_optimizer != "mean":
            raise ConfigError(
                f"server-optimizer = {self.server_optimizer!r} steps factors by their means, which "
                f"lora-aggregation = {self.lora_aggregation!r} does not take: use factors, "
                "freeze-a, alternate or freeze-common"
            )

    def _check_robust(self) -> None:
        """Raises ConfigError unless updates can be folded as configured."""
        self._one_of("aggregation", AGGREGATIONS)
        if not 0 <= self.trim_share < 0.5:
            raise ConfigError(f"trim-share = {self.trim_share} must be 0 or more, and below 0.5")
        if not 0 <= self.hostile_share <= 1:
            raise ConfigError(f"hostile-share = {self.hostile_share} must lie between 0 and 1")
        if not abs(self.hostile_scale) < float("inf"):
            raise ConfigError(f"hostile-scale = {self.hostile_scale} must be a finite number")
        self._at_least("noise-seed", -1)
        there = self.sample_clients or self.clients
        hostile = self.suspects(there)
        if self.aggregation != "mean" and there <= 2 * hostile:
            raise ConfigError(
                f"aggregation = {self.aggregation!r} needs {2 * hostile + 1} clients a round to "
                f"bear {hostile} hostile ones, and there are {there}: have more clients, or lower "
                f"trim-share = {self.trim_share}"
            )
        asked = "clip-norm" if self.clip_norm else "aggregation"
        if (self.clip_norm or self.aggregation != "mean") and (
            self.tuning == "lora" and self.lora_aggregation in MIXED
        ):
            raise ConfigError(
                f"{asked} acts on factors, which lora-aggregation = {self.lora_aggregation!r} does "
                "not fold: use factors, freeze-a, alternate or freeze-common"
            )

    def suspects(self, clients: int) -> int:
        """How many of so many clients may be hostile, for robust folding: one at least."""
        return max(1, round(self.trim_share * clients))

    def hostile(self, client: int) -> bool:
        """Whether a client is one of those that attack, for experiments."""
        count = round(self.hostile_share * self.clients)
        if not count:
            return False
        order = np.random.default_rng([self.seed, 4]).permutation(self.clients)
        return client in order[:count]

    def _check_tuning(self) -> None:
        """Raises ConfigError unless the options of tuning fit together."""
        self.load_tuning()
        self._at_least("slora-rounds", 0)
        self._at_least("lora-rank", 1)
        self._one_of("lora-init", INITS)
        self._one_of("lora-aggregation", MODES)
        if not 0 < self.lora_alpha < float("inf"):
            raise ConfigError(f"lora-alpha = {self.lora_alpha} must be a finite number above 0")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora-dropout = {self.lora_dropout} must be 0 or more, and below 1")
        self._check_ranks()
        if self.tuning != "lora":
            if self.slora_rounds or self.lora_adapter:
                key = "slora-rounds" if self.slora_rounds else "lora-adapter"
                raise ConfigError(f"{key} belongs to tuning = 'lora', not {self.tuning!r}")
            return
        self.lora().check_targets()
        if self.slora_rounds >= self.rounds:
            raise ConfigError(
                f"slora-rounds = {self.slora_rounds} must be below rounds = {self.rounds}, so that "
                "rounds of LoRA follow"
            )
        begins = [self.lora_init != "lora", bool(self.lora_adapter), self.slora_rounds > 0]
        if sum(begins) > 1:
            raise ConfigError(
                "lora-init = 'federa', lora-adapter and slora-rounds each say how factors begin: "
                "choose one"
            )
        if self.lora_aggregation == "freeze-common" and any(begins):
            raise ConfigError(
                "lora-aggregation = 'freeze-common' draws the factors that it freezes: leave "
                "lora-init at 'lora', lora-adapter empty and slora-rounds at 0"
            )

    def _check_ranks(self) -> None:
        """Raises ConfigError unless smaller ranks can be offered as configured."""
        if not self.lora_ranks.strip():
            return
        if self.tuning != "lora":
            raise ConfigError(f"lora-ranks belongs to tuning = 'lora', not {self.tuning!r}")
        most = self.lora_rank
        for text in self.lora_ranks.split(","):
            if not text.strip().isdecimal() or not 1 <= int(text) <= most:
                raise ConfigError(
                    f"lora-ranks = {self.lora_ranks!r}: {text.strip()!r} is no whole number from 1 "
                    f"to lora-rank = {most}; write ranks like '2, 4'"
                )
        if self.lora_aggregation not in MIXED:
            raise ConfigError(
                f"lora-aggregation = {self.lora_aggregation!r} cannot fold different ranks: use "
                f"{' or '.join(MIXED)}, or leave lora-ranks empty"
            )
        if self.planner == "two-stage":
            raise ConfigError(
                "planner = 'two-stage' knows one rank: use planner = 'joint', or leave lora-ranks "
                "empty"
            )

    def offered_ranks(self) -> tuple[int, ...]:
        """Ranks that subnets may train at besides ``lora-rank``."""
        return tuple(int(text) for text in self.lora_ranks.split(",") if text.strip())

    def measured_scores(self) -> tuple[str, ...]:
        """The kinds that scoring passes measure; none where the strategy looks at none."""
        wanted = method_of(self.load_strategy(), self.strategy).scores
        if wanted is None:
            wanted = (self.backward_score, self.forward_score)
        return tuple(k for k in scores.MEASURED if k in wanted)

    def _at_least(self, key: str, least: int) -> None:
        value = self.to_mapping()[key]
        if value < least:
            raise ConfigError(f"{key} = {value} must be {least} or more")

    def _one_of(self, key: str, allowed: tuple[str, ...]) -> None:
        value = self.to_mapping()[key]
        if value not in allowed:
            raise ConfigError(f"{key} = {value!r} is unknown; use one of {', '.join(allowed)}")

    # -- what the keys stand for -------------------------------------------------------------

    def load_strategy(self) -> Any:
        """The strategy's module."""
        return load_strategy(self.strategy)

    def load_tuning(self) -> Any:
        """The module of the way of tuning; see :mod:`clients`."""
        module = load_module("clients", self.tuning, "tuning", TUNINGS)
        if not callable(getattr(module, "learning_rate", None)):
            raise ConfigError(
                f"tuning = {self.tuning!r} has no function learning_rate(kind, factor, options)"
            )
        return module

    def load_trackers(self) -> dict[str, Factory]:
        """What starts the trackers, by their names."""
        return load_trackers(self.trackers)

    def lora(self) -> Lora:
        """What LoRA tunes, and how."""
        targets = tuple(t.strip() for t in self.lora_targets.split(",") if t.strip())
        return Lora(self.lora_rank, self.lora_alpha, targets, self.lora_rslora, self.lora_dropout)

    def depends_on_rounds(self) -> bool:
        """Whether what a round does depends on how many there are to be."""
        staged = method_of(self.load_strategy(), self.strategy).staged and not self.stage_rounds
        return staged or self.epsilon > 0

    def privacy(self) -> Privacy | None:
        """What clients are promised of their data; None for nothing."""
        return Privacy.of(self)

    def budget_source(self) -> BudgetSource:
        """Where clients get their budgets."""
        return budget_source(self.budgets, resolve_path, self.device, self.threads_per_client)

    def model_spec(self) -> ModelSpec:
        """The model to build."""
        from d2ft_fl.data import class_count

        pretrained = self.pretrained
        if pretrained not in BUILTIN["pretrained"]:
            pretrained = str(resolve_path(pretrained))
        return ModelSpec(
            name=self.model,
            arguments=_inline_table("model-args", self.model_args),
            pretrained=pretrained,
            image_size=self.image_size,
            classes=class_count(self._dataset(), self.label_column),
            seed=self.seed,
        )

    def data_spec(self, image_size: int, channels: int) -> DataSpec:
        """The data to open, for images of that size."""
        return DataSpec(
            dataset=self._dataset(),
            label_column=self.label_column,
            image_size=image_size,
            channels=channels,
            clients=self.clients,
            partitioner=self.partitioner,
            partitioner_arguments=_inline_table("partitioner-args", self.partitioner_args),
            train_examples=self.train_examples,
            test_examples=self.test_examples,
            seed=self.seed,
        )

    def _dataset(self) -> str:
        if self.dataset in BUILTIN["dataset"] or self.dataset.startswith(HUB):
            return self.dataset
        return str(resolve_path(self.dataset))

    def local_options(self) -> LocalOptions:
        """How clients train."""
        return LocalOptions(
            batch_size=self.batch_size,
            epochs=self.epochs,
            optimizer=self.optimizer,
            lr=self.lr,
            head_lr=self.head_lr,
            lora_lr=self.lora_lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            precision=self.precision,
            checkpointing=self.checkpointing,
            accumulate=self.accumulate,
            proximal=self.proximal,
        )

    def examples_of(self, local: int) -> int:
        """Of so many examples of a client, on how many it trains in a round."""
        return max(1, round(self.data_share * local)) if local else 0

    def make_server_optimizer(self) -> ServerOptimizer | None:
        """The server's optimiser; None where means are taken as they are."""
        if self.server_optimizer == "mean":
            return None
        return ServerOptimizer(
            self.server_optimizer,
            self.server_lr,
            self.server_momentum,
            self.server_second_momentum,
            self.server_tau,
        )

    def torch_device(self) -> torch.device:
        """Where clients train and the global model is evaluated.

        Raises:
            ConfigError: When this machine has no such device.
        """
        return usable_device(self.device)


def resolve_path(path: str) -> Path:
    """An absolute path. Relative ones start where the command did.

    A Flower app runs elsewhere than it was started; ``d2ft run`` makes paths absolute before.
    """
    return Path(os.path.expanduser(path)).absolute()


def read_toml(path: Path) -> dict[str, Any]:
    """The keys of a configuration file.

    Raises:
        ConfigError: When it cannot be read or is not flat TOML.
    """
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"configuration file {str(path)!r}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {str(path)!r} is not TOML: {error}") from None


def nearest(key: str, known: Iterable[str]) -> str:
    """What somebody who wrote ``key`` may have meant, as the end of a message."""
    known = list(known)
    near = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"


def _typed(key: str, value: Any, kind: Any) -> Any:
    """``value`` as the type that key has; an int passes for a float, and for text."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is str and type(value) is int:  # `--set lora-ranks=4`
        return str(value)
    if type(value) is not kind:
        name = type(value).__name__
        article = "an" if name[0] in "aeiou" else "a"
        raise ConfigError(f"{key} = {value!r} is {article} {name}; write a {_EXAMPLES[kind]}")
    return value


_EXAMPLES = {
    int: "whole number, like 10",
    float: "number, like 0.5",
    str: 'string, like "text"',
    bool: "truth value: true or false",
}


def _inline_table(key: str, text: str) -> tuple[tuple[str, Any], ...]:
    """``a = 1, b = "x"`` as pairs, sorted by name, lists as tuples."""
    try:
        table = tomllib.loads(f"table = {{ {text} }}")["table"]
    except tomllib.TOMLDecodeError:
        raise ConfigError(
            f'{key} = {text!r} cannot be read; write pairs like "alpha = 0.5, shuffle = true"'
        ) from None
    return tuple(
        (name, tuple(v) if isinstance(v, list) else v) for name, v in sorted(table.items())
    )
