"""What a finished model loses without heads, and without blocks, with nothing trained again.

    python experiments/accuracy/ablate.py RUN [--examples 500]

Points of accuracy lost on held-out examples. This is what `d2ft_fl.planning.utility` says of
skipping.
"""

import argparse
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.data.federated_data import open_data
from d2ft_fl.engine.partial_model import PartialModel
from d2ft_fl.models.build import build_adapter
from d2ft_fl.rounds.components import Components
from d2ft_fl.subnets.packing import GlobalModel
from d2ft_fl.subnets.schedule import Operation, Schedule
from d2ft_fl.util.toml import read_toml

BATCH = 125


class Ablation:
    """A model, and examples to try parts of it on."""

    def __init__(self, run: Path, count: int):
        config = RunConfig.from_mapping(read_toml(run / "config.toml"))
        adapter = build_adapter(Components(config).model_spec)
        self.arch = adapter.describe()
        weights = safetensors.torch.load_file(run / "model.safetensors")
        self.weights = GlobalModel.of(self.arch, weights)
        data = open_data(Components(config).data_spec(adapter.input_shape))
        images, labels = data.test_batch(0, data.test_size)
        drawn = torch.from_numpy(np.random.default_rng(0).permutation(len(labels))[:count])
        self.images, self.labels = images[drawn], labels[drawn]
        self.model = PartialModel(adapter, self.arch)
        self.whole = self.accuracy(self._all())

    def _all(self) -> np.ndarray:
        shape = self.arch.blocks, self.arch.heads
        return np.full(shape, Operation.FORWARD_ONLY, dtype=np.int8)

    @torch.inference_mode()
    def accuracy(self, operations: np.ndarray) -> float:
        """In per cent, of what runs: int8 [blocks, heads]."""
        self.model.reset(Schedule(operations[None]), self.weights, gradients=False)
        parts = self.images.split(BATCH)
        logits: Tensor = torch.cat([self.model(part, [len(part)]) for part in parts])
        return 100 * float((logits.argmax(dim=1) == self.labels).double().mean())

    def lost(self, skipped: np.ndarray) -> float:
        """Points without some heads: bool [blocks, heads]."""
        operations = self._all()
        operations[skipped] = Operation.SHORTCUT
        return self.whole - self.accuracy(operations)


def main() -> None:
    """Print a row a block, and what several heads at once cost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--examples", type=int, default=500)
    given = parser.parse_args()
    ablation = Ablation(given.run, given.examples)
    blocks, heads = ablation.arch.blocks, ablation.arch.heads
    print(f"accuracy {ablation.whole:.1f} % on {len(ablation.labels)} examples")
    print("| block | its first head | all of it |\n| --- | ---: | ---: |")
    for block in range(blocks):
        first = np.zeros((blocks, heads), dtype=bool)
        first[block, 0] = True
        whole = np.zeros((blocks, heads), dtype=bool)
        whole[block] = True
        print(f"| {block} | {ablation.lost(first):.1f} | {ablation.lost(whole):.1f} |", flush=True)
    order = np.random.default_rng(0).permutation(blocks * heads)
    for share in (12, 6, 3):
        count = max(1, blocks * heads // share)
        drawn, last = np.zeros(blocks * heads, dtype=bool), np.zeros(blocks * heads, dtype=bool)
        drawn[order[:count]], last[-count:] = True, True
        said = [f"{ablation.lost(what.reshape(blocks, heads)):.1f}" for what in (drawn, last)]
        print(f"{count} heads: drawn at random {said[0]}, the last ones {said[1]}")


if __name__ == "__main__":
    main()
