"""Flower's ServerApp: drives the pure round over Flower's messages.

Flower's own ``Strategy.start`` collects every reply before it aggregates and wants equal keys in
all of them; head-wise replies differ and are folded in as they arrive, so messages are pushed and
pulled here.
"""

import contextlib
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from d2ft_fl import display, loop
from d2ft_fl.budgets import Budget
from d2ft_fl.client_app import pack_blob, unpack_blob
from d2ft_fl.config import RunConfig
from d2ft_fl.errors import ConfigError, D2FTError, RunError
from d2ft_fl.federation import Report
from d2ft_fl.recorder import claim_folder, write_status

app = ServerApp()
POLL_SECONDS = 0.05
NODES_TIMEOUT = 120.0


class FlowerPool:
    """The clients of a federation behind Flower's grid."""

    def __init__(self, grid: Grid, config: RunConfig):
        self.grid, self.config = grid, config
        self.node_of: dict[int, int] = {}  # client -> Flower's node id

    def reports(self, round: int) -> list[Report]:
        """Ask every node; waits until all that the nodes speak of are there.

        Raises:
            ConfigError: With what a client found wrong with the configuration.
            RunError: When nodes stay away.
        """
        deadline = time.monotonic() + NODES_TIMEOUT
        while time.monotonic() < deadline:
            answers = sorted(self._ask(round), key=lambda pair: pair[1]["node"])
            for _, answer in answers:
                if "error" in answer:
                    raise ConfigError(answer["error"])
            if answers and len({a["node"] for _, a in answers}) == answers[0][1]["nodes"]:
                return self._read(answers)
            time.sleep(0.5)
        raise RunError(f"{len(answers)} SuperNodes answered within {NODES_TIMEOUT:.0f} s, too few")

    def _ask(self, round: int) -> list[tuple[int, dict]]:
        content = RecordDict({"query": ConfigRecord({"round": round})})
        messages = [
            Message(content, dst_node_id=node, message_type="query")
            for node in sorted(self.grid.get_node_ids())
        ]
        replies = self.grid.send_and_receive(messages, timeout=self.config.round_timeout)
        out = []
        for reply in replies:
            if reply.has_error():
                raise RunError(f"a SuperNode failed to answer: {reply.error.reason}")
            answer = json.loads(str(reply.content.config_records["answer"]["json"]))
            out.append((reply.metadata.src_node_id, answer))
        return out

    def _read(self, answers: list[tuple[int, dict]]) -> list[Report]:
        reports = []
        for node_id, answer in answers:
            for r in answer["reports"]:
                self.node_of[r["client"]] = node_id
                budget = Budget.from_mapping(r["budget"], f"client {r['client']}")
                reports.append(Report(r["client"], r["examples"], budget))
        return reports

    def train(
        self, clients: list[int], assignment: Callable[[int], bytes]
    ) -> Iterator[tuple[int, bytes | loop.Fault]]:
        """One message a node, with the assignments of its clients; replies as they arrive."""
        by_node: dict[int, list[int]] = {}
        for client in clients:
            by_node.setdefault(self.node_of[client], []).append(client)
        waiting: dict[str, list[int]] = {}
        for node, own in by_node.items():
            record = ArrayRecord({str(c): pack_blob(assignment(c)) for c in own})
            message = Message(
                RecordDict({"assignments": record}), dst_node_id=node, message_type="train"
            )
            pushed = list(self.grid.push_messages([message]))
            if pushed:
                waiting[pushed[0]] = own
            else:
                yield from ((c, loop.Fault("its SuperNode is gone")) for c in own)
        deadline = time.monotonic() + self.config.round_timeout
        while waiting and time.monotonic() < deadline:
            for reply in self.grid.pull_messages(list(waiting)):
                own = waiting.pop(reply.metadata.reply_to_message_id, [])
                yield from _results(reply, own)
            time.sleep(POLL_SECONDS)
        for own in waiting.values():
            yield from ((c, loop.Fault("no answer within round-timeout")) for c in own)


def _results(reply: Message, own: list[int]) -> Iterator[tuple[int, bytes | loop.Fault]]:
    if reply.has_error():
        yield from ((c, loop.Fault(f"its SuperNode failed: {reply.error.reason}")) for c in own)
        return
    results = reply.content.array_records.get("results", ArrayRecord())
    for client in own:
        array = results.get(str(client))
        yield client, unpack_blob(array) if array is not None else loop.Fault("no result")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the configured federation; its lines and tables go to the log."""
    folder: Path | None = None
    try:
        config = RunConfig.from_mapping(context.run_config).check()
        folder = claim_folder(config)
        display.say(f"run folder: {folder}")
        display.header(config)
        filled = RunConfig(**{**vars(config), "run_folder": str(folder)})
        summary = loop.run(filled, FlowerPool(grid, config), display.round_line)
        display.summary(summary)
    except D2FTError as error:
        named = str(context.run_config.get("run-folder", ""))
        if folder or named:
            with contextlib.suppress(OSError):
                write_status(folder or Path(named), "failed", str(error))
        _last_word(f"d2ft: {error}")
        raise  # so that Flower calls the run failed


def _last_word(line: str) -> None:
    """Say one line and keep Flower from burying it under tracebacks in this ending process."""
    logging.getLogger("flwr").addFilter(lambda record: False)
    warnings.simplefilter("ignore")
    display.say(line)
