"""What becomes of every client in a round: trained, failed, or sat out."""

from collections.abc import Container, Mapping
from dataclasses import replace
from types import MappingProxyType

from d2ft_fl.planning.assignment import Assignment, Participant
from d2ft_fl.records.client_record import ClientRecord
from d2ft_fl.rounds.plan import Plan
from d2ft_fl.server.dispatch import short_reason
from d2ft_fl.server.reply_reader import Usage
from d2ft_fl.subnets.schedule import Operation


class Outcomes:
    """Keeps what became of the clients of one plan.

    Args:
        plan: The plan of the round.
        rank: The rank of the architecture's factors; 0 without any.
        predicted: Client -> seconds that it is predicted to train on this machine, where known.

    Attributes:
        pending: Client -> its assignment, while its answer is awaited.
        records: Client -> what became of it, once no answer is awaited.
        strays: Failures of clients that nobody waits for, as lines.
    """

    def __init__(
        self, plan: Plan, rank: int, predicted: Mapping[int, float] = MappingProxyType({})
    ):
        self.plan, self.rank, self.predicted = plan, rank, predicted
        self.participants = {c.client: c for c in plan.clients}
        self.pending = {a.client: a for a in plan.working}
        self.records: dict[int, ClientRecord] = {}
        self.strays: list[str] = []

    @property
    def trained(self) -> Container[int]:
        """The clients whose replies were aggregated."""
        return {r.client for r in self.records.values() if r.used is not None}

    @property
    def answered(self) -> int:
        """How many clients' replies were aggregated."""
        return sum(record.used is not None for record in self.records.values())

    @property
    def failures(self) -> list[str]:
        """What went wrong so far: failed clients in order, then strays."""
        failed = [self.records[client] for client in sorted(self.records)]
        return [f"client {r.client}: {r.failure}" for r in failed if r.failure] + self.strays

    def succeed(self, client: int, usage: Usage) -> None:
        """Note that a client's reply was aggregated."""
        assignment = self.pending.pop(client)
        self.records[client] = self._record(assignment, usage, None)

    def fail(self, client: int, reason: str) -> None:
        """Note that a client failed; the failure of one that nobody waits for becomes a stray."""
        assignment = self.pending.pop(client, None)
        if assignment is None:
            self.stray(client, reason)
        else:
            self.records[client] = self._record(assignment, None, short_reason(reason))

    def stray(self, client: int, reason: str) -> None:
        """Note a failure of a client that nobody waits for, or not any more."""
        self.strays.append(f"client {client}: {short_reason(reason)}")

    def stray_answer(self, client: int) -> None:
        """Note an answer that nobody waits for."""
        known = client in self.participants
        self.stray(client, "answers again" if known else "an answer nobody waits for")

    def finish(self) -> list[ClientRecord]:
        """Return the records of all clients in order; those still awaited have failed."""
        for client in list(self.pending):
            self.fail(client, "no answer")
        for assignment in self.plan.assignments:
            if assignment.client not in self.records:
                self.records[assignment.client] = self._record(assignment, None, None)
        return [self.records[c.client] for c in self.plan.clients]

    @classmethod
    def planned(cls, plan: Plan, rank: int) -> list[ClientRecord]:
        """Return records of all clients of a plan as if each did what it says, in order.

        Args:
            plan: The plan.
            rank: The rank of the architecture's factors; 0 without any.
        """
        own = cls(plan, rank)
        out = []
        for a in plan.assignments:
            record = own._record(a, None, None)
            if a.client in own.pending:
                seconds = own.participants[a.client].budget.seconds(a.cost)
                record = replace(record, used=a.cost, seconds=seconds)
            out.append(record)
        return out

    def _record(
        self, assignment: Assignment, usage: Usage | None, failure: str | None
    ) -> ClientRecord:
        """Return the record of a client; without usage and failure, it sat out."""
        participant: Participant = self.participants[assignment.client]
        operations = assignment.schedule.operations
        shares = {o.name.lower(): float((operations == o).mean()) for o in Operation}
        # How long it computes on its device is predicted, whatever it took here.
        used = None if usage is None else replace(usage.cost, work=assignment.cost.work)
        return ClientRecord(
            client=assignment.client,
            device=participant.budget.device,
            examples=assignment.examples or 0,
            operations=shares,
            policy=assignment.policy,
            predicted=assignment.cost,
            allowed=participant.capacity,
            used=used,
            seconds=participant.budget.seconds(used) if used else 0.0,
            deadline=participant.budget.deadline,
            wall_seconds=0.0 if usage is None else usage.wall_seconds,
            predicted_seconds=self.predicted.get(assignment.client),
            training_seconds=0.0 if usage is None else usage.training_seconds,
            train_loss=None if usage is None else usage.train_loss,
            scored=assignment.probes.scored,
            viewed=assignment.probes.viewed,
            gap=assignment.gap,
            rank=assignment.schedule.mean_rank(self.rank),
            failure=failure,
        )
