"""Options of how a run is carried out, and of what it leaves behind."""

from dataclasses import dataclass

from d2ft_fl.config.choices import DEVICES, FEW_REPLIES, TRANSPORTS
from d2ft_fl.config.option import option


@dataclass(frozen=True)
class RunningOptions:
    """Running."""

    device: str = option(
        "cpu", "Device that clients train on and the server evaluates on.", choices=DEVICES
    )
    threads_per_client: int = option(
        1, "Torch threads of a client; results in float depend on it.", low=1, unit="threads"
    )
    eval_batch_size: int = option(
        128, "Examples of one step of the global evaluation.", low=1, unit="examples"
    )
    eval_every: int = option(
        1,
        "Rounds from one global evaluation to the next; the last round is always evaluated.",
        low=1,
        unit="rounds",
    )
    transport: str = option(
        "shared",
        "How the model reaches clients: shared lets the processes of one machine share it in "
        "memory, message sends it to each.",
        choices=TRANSPORTS,
    )


@dataclass(frozen=True)
class FailureOptions:
    """Failures and checkpoints."""

    round_timeout: float = option(
        3600.0,
        "Time to wait for the clients of a round before going on without them.",
        above=0,
        unit="seconds",
    )
    client_timeout: float = option(
        0.0,
        "Time that one client may train in a round; 0 for no limit but the round's.",
        low=0,
        unit="seconds",
    )
    min_replies: int = option(
        1, "Replies that a round needs to be aggregated.", low=0, unit="clients"
    )
    few_replies: str = option(
        "stop",
        "What follows fewer replies than min-replies: stop the run, which can be resumed, or "
        "repeat the round.",
        choices=FEW_REPLIES,
    )
    attempts: int = option(3, "Attempts at one round, with few-replies = repeat.", low=1)
    checkpoint_every: int = option(
        1, "Rounds from one checkpoint to the next; 0 for none.", low=0, unit="rounds"
    )
    resume: str = option(
        "",
        "Folder of a run to go on with from its last checkpoint; empty for a new run.",
        no_path=("",),
    )


@dataclass(frozen=True)
class RecordOptions:
    """Records."""

    verify_costs: bool = option(
        False, "Whether the FLOPs of all training are counted and compared with the plan."
    )
    trackers: str = option(
        "",
        "Trackers that get every figure, separated by commas: tensorboard, wandb, mlflow, or "
        "module:callable of your own; empty for none.",
    )
    run_folder: str = option(
        "",
        "Folder that results go to; empty for a new folder in the user's data folder.",
        no_path=("",),
    )
