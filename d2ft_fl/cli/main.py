"""The ``d2ft`` command: its groups of commands put together."""

import typer

from d2ft_fl.cli import bench
from d2ft_fl.cli.budgets import budgets_command, profile_command
from d2ft_fl.cli.certificates import certificates_command
from d2ft_fl.cli.export import export_command
from d2ft_fl.cli.options import options_command
from d2ft_fl.cli.plan import choose_command, plan_command
from d2ft_fl.cli.report import report_command
from d2ft_fl.cli.run import run
from d2ft_fl.cli.strategies import strategies_command
from d2ft_fl.cli.sweep import sweep_command
from d2ft_fl.util import limits, proxies

app = typer.Typer(
    help="Federated fine-tuning of transformers under hard per-client budgets.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def begin() -> None:
    """Prepare this process for any command."""
    proxies.spare_own_addresses()
    limits.raise_descriptors()


app.command("run")(run)
app.command("plan")(plan_command)
app.command("sweep")(sweep_command)
app.command("budgets")(budgets_command)
app.command("choose")(choose_command)
app.command("options")(options_command)
app.command("strategies")(strategies_command)
app.command("profile")(profile_command)
app.command("certificates")(certificates_command)
app.command("report")(report_command)
app.command("export")(export_command)
app.add_typer(bench.app, name="bench")

if __name__ == "__main__":
    app()
