"""d2ft, but in the first round the classifier alone, for all who can run everything forward."""

from d2ft_fl import Assignment, Round
from d2ft_fl.strategies import d2ft, linear_probe

PAPER = "Kumar et al., Fine-Tuning can Distort Pretrained Features, ICLR 2022, arXiv 2202.10054"


def schedule(context: Round) -> list[Assignment]:
    """The classifier first, then everything that budgets afford."""
    wanted = d2ft.schedule(context)
    if context.number > 1:
        return wanted
    first = linear_probe.schedule(context)
    return [w if f.schedule.sits_out else f for f, w in zip(first, wanted, strict=True)]
