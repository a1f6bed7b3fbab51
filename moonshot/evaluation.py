"""Perplexity and accuracy: the old name of moonshot.models.evaluation, which stays."""

from moonshot.models.evaluation import Accuracy, Perplexity, accuracy, perplexity
from moonshot.models.losses import mean_loss, sample_losses

__all__ = ["Accuracy", "Perplexity", "accuracy", "mean_loss", "perplexity", "sample_losses"]
