"""What was released of a run with noise: every noisy sum that somebody may have seen.

A round is released when its noise is drawn: from then on its model is evaluated, recorded and sent.
A run that is killed afterwards and goes on from an older checkpoint runs the round again. With the
same replies its sums are the same, and so is the noise, which is a function of key and sums: that
is the same release once more, and tells nothing new. With other replies (a client failed, or did
not fail this time) the noise is another, and that is a new release. So releases are written down,
each before its noise is used, and the accountant counts those that differ:

    releases.jsonl    {"round": 3, "release": "5f...": a hash of sums and noise under the run's key}
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from d2ft_fl.aggregation.privacy import Privacy
from d2ft_fl.errors import ConfigError, RunError
from d2ft_fl.util.files import OWNER, append_lines, keep_lines, read_lines

FILE = "releases.jsonl"
UNNAMED = ""  # the release of a round of which it is only known that it was finished


@dataclass
class Releases:
    """The releases of a run so far.

    Attributes:
        privacy: What the run promises.
        path: The file in which they are written down; None to keep them in memory alone.
        names: Round -> names of its releases.
    """

    privacy: Privacy
    path: Path | None = None
    names: dict[int, set[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, privacy: Privacy, folder: Path, rounds: int) -> "Releases":
        """Return the releases that a run's folder knows of.

        Args:
            privacy: What the run promises.
            folder: The run folder.
            rounds: Rounds that were finished before: each was released once at least.

        Raises:
            ConfigError: When the file is damaged.
        """
        path = folder / FILE
        found = cls(privacy, path)
        lines = read_lines(path)
        if path.exists() and len(lines) < path.read_bytes().count(b"\n"):
            raise ConfigError(
                f"resume: line {len(lines) + 1} of {str(path)!r} is damaged, so that nobody knows "
                "what was released: start another run"
            )
        keep_lines(path, sys.maxsize, OWNER)  # a line that was being written was no release yet
        for line in lines:
            found.names.setdefault(line["round"], set()).add(line["release"])
        for number in range(1, rounds + 1):
            found.names.setdefault(number, {UNNAMED})
        return found

    @property
    def epsilon(self) -> float:
        """The privacy that all releases together cost."""
        return self._epsilon(self.names)

    def note(self, round_number: int, name: str) -> None:
        """Write down a release, unless it was made before; only then may it be made.

        Args:
            round_number: The round, counted from 1.
            name: Another one for other sums, counts or noise.

        Raises:
            RunError: When it would cost more than was promised.
        """
        known = self.names.get(round_number, set())
        if name in known:
            return
        names = {**self.names, round_number: known | {name}}
        epsilon = self._epsilon(names)
        if epsilon > self.privacy.most:
            raise RunError(
                f"round {round_number} is not released: some rounds were released before the run "
                "was resumed, with other replies, and with this one epsilon would be "
                f"{epsilon:.4g}, above epsilon = {self.privacy.most:g}; start another run"
            )
        if self.path:
            append_lines(self.path, [{"round": round_number, "release": name}], OWNER)
        self.names = names

    def _epsilon(self, names: dict[int, set[str]]) -> float:
        return self.privacy.epsilon(len(of_round) for of_round in names.values())
