"""How large a training is: what a study sets its losses against. RUN/scale.json, written by rank 0. Torch-free."""

from pathlib import Path

from pydantic import BaseModel, ValidationError

from data_pipeline.errors import UsageError


class Scale(BaseModel):
    """``embedding_parameters`` are those of look-up tables, which are part of ``parameters`` but of no product. FLOPs
    are the model's, forward and backward, a multiply-add counted as two; None where they cannot be counted."""

    parameters: int
    embedding_parameters: int
    tokens_per_step: int
    flops_per_step: float | None


def read_scale(path: Path) -> Scale | None:
    """None where there is no such file yet. UsageError where it is damaged."""
    try:
        return Scale.model_validate_json(path.read_text())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise UsageError(f"{path}: damaged ({error.errors()[0]['msg']}); training on writes it anew") from None
