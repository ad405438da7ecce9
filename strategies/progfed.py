"""Progressive training: the model grows from its first layers to all of them over the rounds.

In stage s of S the first s/S of the layers train and the others are skipped, so that early rounds
are cheap. A stage has ``stage-rounds`` rounds; by default stages divide the run evenly. Accuracy is
measured with all layers in every round, also with those that were skipped in training so far.

Deviates: the paper trains all layers of the stage on every client; here a client trains as many of
the first ones as its budgets afford. New layers begin pretrained, not at random. One classifier
serves all stages, instead of one for each stage, and new layers have no warm-up.
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
