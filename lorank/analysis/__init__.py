"""What a model uses: how many dimensions its activations, weights and gradients need, and ranks that fit a budget."""

from lorank.analysis.effective_rank import analyze
from lorank.analysis.ranks import Suggestion, suggest_ranks
from lorank.analysis.result import Analysis, Projection
from lorank.analysis.spectrum import feature_rank

__all__ = ["Analysis", "Projection", "Suggestion", "analyze", "feature_rank", "suggest_ranks"]
