"""How clients train: what costs depend on, and training follows."""

from dataclasses import dataclass, fields, replace

from d2ft_fl.config.run_config import RunConfig


@dataclass(frozen=True)
class TrainingOptions:
    """How a client trains what it was assigned.

    The attributes are those options of a :class:`.RunConfig` that decide it, under the same names;
    their meaning and their defaults stand there. Build one with :meth:`of`.
    """

    batch_size: int
    epochs: int
    optimizer: str
    lr: float
    head_lr: float
    lora_lr: float
    momentum: float
    weight_decay: float
    precision: str
    checkpointing: bool
    micro_batches: int
    proximal: float

    @classmethod
    def of(cls, config: RunConfig) -> "TrainingOptions":
        """Return the options of a run that say how its clients train."""
        return cls(**{f.name: getattr(config, f.name) for f in fields(cls)})

    def at(self, factor: float, rate: float = 1.0) -> "TrainingOptions":
        """Return options with other learning rates.

        Args:
            factor: What all learning rates are multiplied by.
            rate: What all but the classifier's are multiplied by besides.
        """
        return replace(
            self,
            lr=self.lr * factor * rate,
            head_lr=self.head_lr * factor,
            lora_lr=self.lora_lr * factor * rate,
        )

    def under(self, policy: "ExecutionPolicy") -> "TrainingOptions":
        """Return options that follow an execution policy in what costs depend on."""
        return replace(
            self,
            batch_size=self.batch_size if policy.batch is None else policy.batch,
            micro_batches=(
                self.micro_batches if policy.micro_batches is None else policy.micro_batches
            ),
            checkpointing=(
                self.checkpointing if policy.checkpointing is None else policy.checkpointing
            ),
        )

    def plain(self) -> "TrainingOptions":
        """Return options without what trades FLOPs or time for memory."""
        return replace(self, checkpointing=False, micro_batches=1)


@dataclass(frozen=True)
class ExecutionPolicy:
    """How a client runs its schedule, where that is not as configured; None is as configured.

    Attributes:
        micro_batches: Parts that a batch is run in, one after another.
        checkpointing: Whether activations are computed again.
        tokens: Of an example, that blocks see in training, prefix tokens included. Which patches
            those are is drawn anew for every example and batch (PatchDropout, Liu et al., WACV
            2023, arXiv 2208.07220). None for all.
        bits_up: Of each number that travels up; see :mod:`d2ft_fl.wire.quantization`.
        bits_down: Of each that travels down; fewer than 32 only with fewer up.
        in_turn: Whether fewer examples than a client has are taken in turn, those of a round after
            those of the one before, in an order of the run: each is seen as often as any other.
            Otherwise every round draws its own.
        rate: What the learning rates of all but the classifier are multiplied by.
        weight: What each of its examples counts when means are taken.
        step: What the server multiplies the client's change by; see :class:`Update
            <d2ft_fl.aggregation.update.Update>`.
        batch: Examples of a step, one a slot at least: fewer of them make more steps.
    """

    micro_batches: int | None = None
    checkpointing: bool | None = None
    tokens: int | None = None
    bits_up: int | None = None
    bits_down: int | None = None
    in_turn: bool = False
    rate: float = 1.0
    weight: float = 1.0
    step: float = 1.0
    batch: int | None = None

    @property
    def priced(self) -> "ExecutionPolicy":
        """The policy without what costs do not depend on."""
        return replace(self, in_turn=False, rate=1.0, weight=1.0, step=1.0)


DEFAULT_POLICY = ExecutionPolicy()
