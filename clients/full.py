"""Full fine-tuning: every assigned slice trains; the new classifier has a rate of its own."""

from d2ft_fl import Kind, TrainingOptions


def learning_rate(kind: Kind, factor: bool, options: TrainingOptions) -> float:
    """The classifier and final norm learn at ``head-lr``, all else at ``lr``."""
    return options.head_lr if kind is Kind.FINAL else options.lr
