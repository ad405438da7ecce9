"""Progressive training: the model grows from its first layers to all of them over the rounds.

In stage s of S, ``stage-rounds`` rounds each (by default as many as divide the run evenly), the
first s/S of the layers train and the rest is skipped, so that early rounds are cheap.

Deviates: the paper trains all of the model that there is on every client; here a client whose
budgets do not afford the stage trains the first layers that they do. New layers begin pretrained,
not at random, there is one classifier for all stages instead of a head a stage, and no warm-up of
new layers.
"""

from d2ft_fl.rounds import Assignment, Round
from strategies.depthfl import first_layers

PAPER = """Wang et al., ProgFed: Effective, Communication, and Computation Efficient Federated
Learning by Progressive Training, ICML 2022, arXiv 2110.05323"""
SCORES = ()
STAGES = 4  # the paper's


def schedule(round: Round) -> list[Assignment]:
    """As much of the stage's depth as fits, for everyone."""
    blocks = round.shape[0]
    stages = min(STAGES, blocks)
    grown = -(-blocks * (round.stage(stages) + 1) // stages)
    depths = [first_layers(round, count) for count in range(1, grown + 1)]
    return [round.largest(client, depths) for client in round.clients]
