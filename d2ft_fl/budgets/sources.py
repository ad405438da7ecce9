"""Where clients get their budgets: device classes, measurements, files, plug-ins."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from d2ft_fl.budgets.budget import Budget, ClientDescription
from d2ft_fl.budgets.device_classes import ASSETS, BUILTIN, read_devices
from d2ft_fl.errors import ConfigError
from d2ft_fl.util.plugins import load_attribute

MEASURED = "measured"


class BudgetSource(Protocol):
    """Decides what a client can afford in a round.

    Called where the client is: once before the run in each client's process, and before every round
    if :attr:`varies`. The answer should depend on the arguments and on the machine alone.

    A plug-in, ``budgets = "module:function"``, is a function with the signature of
    :meth:`__call__`, which may also return a mapping with the entries of a class in a file of
    devices, such as ``{"memory": "512 MiB", "flops": "60 %"}``. It counts as varying.
    """

    @property
    def varies(self) -> bool:
        """Whether clients have to be asked again every round."""

    def __call__(self, client: ClientDescription, round_number: int) -> Budget:
        """Return the budget of a client in a round.

        Args:
            client: The client, with its number of examples and the number of clients.
            round_number: The round that comes, counted from 1.

        Raises:
            ConfigError: When there is no budget to be had.
        """


def budget_source(
    spec: str,
    resolve: Callable[[str], Path],
    device: str = "cpu",
    threads: int = 1,
    precision: str = "fp32",
) -> BudgetSource:
    """Return the source that a configuration names.

    Args:
        spec: ``devices``, ``hardware``, ``measured``, a path ending in ``.toml``, or
            ``module:callable``.
        resolve: Makes a path absolute.
        device: Where ``measured`` measures: cpu or cuda.
        threads: Threads of torch that ``measured`` measures with.
        precision: Of products that ``measured`` measures: fp32 or bf16.

    Raises:
        ConfigError: When there is none such, or its file is wrong.
    """
    if spec in BUILTIN:
        return read_devices(ASSETS / f"{spec}.toml")
    if spec == MEASURED:
        from d2ft_fl.budgets.machine import Measured  # loads torch, which takes seconds

        return Measured(device, threads, precision)
    if spec.endswith(".toml"):
        return read_devices(resolve(spec))
    if ":" in spec:
        function = load_attribute(spec, "budgets")
        if not callable(function):
            raise ConfigError(f"budgets = {spec!r} is a {type(function).__name__}, not a callable")
        return Plugin(spec, function)
    raise ConfigError(
        f"budgets = {spec!r}; use {', '.join(map(repr, (*BUILTIN, MEASURED)))}, a path ending in "
        ".toml, or 'module:callable'"
    )


@dataclass(frozen=True)
class Plugin:
    """A ``module:callable`` of the user's, its answers checked."""

    spec: str
    function: Callable[[ClientDescription, int], Any]
    varies: bool = True

    def __call__(self, client: ClientDescription, round_number: int) -> Budget:
        """Return what the function answers, once it is a budget.

        Args:
            client: The client.
            round_number: The round that comes, counted from 1.

        Raises:
            ConfigError: When it raises, or its answer is no budget.
        """
        where = f"budgets = {self.spec!r}"
        try:
            answer = self.function(client, round_number)
        except Exception as error:
            raise ConfigError(
                f"{where} raised {type(error).__name__}: {error} "
                f"for client {client.client} in round {round_number}"
            ) from error
        if isinstance(answer, Budget):  # read back, so that its entries are checked too
            answer = answer.to_json()
        if not isinstance(answer, Mapping):
            raise ConfigError(
                f"{where} returned a {type(answer).__name__}; return a Budget or a mapping"
            )
        budget = Budget.from_mapping({str(k): v for k, v in answer.items()}, where)
        budget.check(where)
        return budget
