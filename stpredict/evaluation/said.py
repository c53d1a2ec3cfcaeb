"""What an evaluate job's metrics.json says to a person, whatever was measured. Torch-free."""

from pathlib import Path

from stpredict.evaluation import forecast_scores, results
from stpredict.evaluation.reconstructed import read_metrics


def said_of(path: Path) -> str:
    """UsageError where metrics.json is missing or damaged."""
    if forecast := forecast_scores.read_forecast_metrics(path):
        return forecast_scores.as_text(forecast)
    if reconstruction := read_metrics(path):
        return reconstruction.in_words()
    return results.as_text(results.read_evaluation(path))
