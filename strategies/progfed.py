"""Progressive training: the model grows from its first layers to all of them over the rounds.

In stage s of S, ``stage-rounds`` rounds each (by default stages divide the run evenly), the first
s/S of the layers train and the rest is skipped, so that early rounds are cheap. Accuracy is that of
all layers in every round: before the last stage some of them were skipped in training.

Deviates: the paper trains all of the model that there is on every client; here a client whose
budgets do not afford the stage trains the first layers that they do. New layers begin pretrained,
not at random, there is one classifier for all stages instead of a head a stage, and no warm-up of
new layers.
"""

from d2ft_fl import Assignment, Round

from .depthfl import first_layers

PAPER = """Wang et al., ProgFed: Effective, Communication, and Computation Efficient Federated
Learning by Progressive Training, ICML 2022, arXiv 2110.05323"""
SCORES = ()
STAGED = True
STAGES = 4  # the paper's


def schedule(context: Round) -> list[Assignment]:
    """Assign as much of the stage's depth as fits, for everyone."""
    blocks = context.shape[0]
    stage, stages = context.stage(min(STAGES, blocks))
    grown = -(-blocks * (stage + 1) // stages)
    depths = [first_layers(context, count) for count in range(1, grown + 1)]
    return [context.largest(client, depths) for client in context.clients]
