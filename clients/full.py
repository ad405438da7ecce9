"""Full fine-tuning: every assigned slice trains, the classifier at another learning rate."""

from d2ft_fl import Kind, TrainingOptions

from .base import Tuning


class FullTuning(Tuning):
    """Train every assigned slice as it is."""

    def learning_rate(self, kind: Kind, factor: bool, options: TrainingOptions) -> float:
        """Return ``head-lr`` for the classifier and the final norm, ``lr`` for everything else."""
        return options.head_lr if kind is Kind.FINAL else options.lr


tuning = FullTuning
