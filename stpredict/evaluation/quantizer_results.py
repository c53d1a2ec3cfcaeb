"""What is found of a forecaster's quantizer (quantizer_analysis.py): quantizer.json. Torch-free."""

from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from data_pipeline.errors import UsageError


class Distribution(BaseModel):
    """Of all values of a tensor; the density is of the values standardised by their own mean and deviation."""

    rows: int = Field(description="locations, or codes")
    columns: int = Field(description="codes, or channels")
    mean: float
    sd: float
    kurtosis: float = Field(description="excess: 0 of a normal distribution; higher is more concentrated, sparser")
    zeros: float = Field(description="share of values that are exactly 0")
    edges: list[float] = Field(description="of the density's bins, in standard deviations")
    density: list[float] = Field(description="per standard deviation")


class Activity(BaseModel):
    """Weights further from their mean than a threshold, as SVQ's paper takes the use of codes (section C.1)."""

    threshold: float = Field(description="in standard deviations")
    perplexity: float = Field(description="exp of the entropy of the codes' parts in all that is active; 0: nothing is")
    share: float = Field(description="of all weights that are active")
    codes: int = Field(description="that are ever active")


class CodeUse(BaseModel):
    """Of one stage of a quantizer that chooses codes: a quantizer, a head, or a group's."""

    perplexity: float
    used_share: float = Field(description="of the codes that were ever chosen")


class QuantizerAnalysis(BaseModel):
    """``weights``, ``codebook`` and ``activity`` are of those that weigh codes (svq, svq_raw), ``uses`` of those that
    choose them."""

    quantizer: str
    place: str
    samples: int
    locations: int = Field(description="places of all frames of all samples")
    before: Distribution = Field(description="latents that go into the quantizer")
    after: Distribution = Field(description="latents that come out")
    codebook_size: int
    weights: Distribution | None = None
    codebook: Distribution | None = None
    activity: list[Activity] = []
    uses: list[CodeUse] = []

    def in_words(self) -> str:
        """One line."""
        said = f"{self.quantizer} {self.place} the translator, {self.locations:,} locations: "
        for found in self.activity:
            said += f"perplexity {found.perplexity:,.1f} of {self.codebook_size:,} codes at {found.threshold:g} sd, "
        if self.weights and self.codebook:
            said += f"kurtosis of weights {self.weights.kurtosis:.2f}, of the codebook {self.codebook.kurtosis:.2f}, "
        if self.uses:
            perplexity = sum(stage.perplexity for stage in self.uses) / len(self.uses)
            used = sum(stage.used_share for stage in self.uses) / len(self.uses)
            said += f"perplexity {perplexity:,.1f} of {self.codebook_size:,} codes, {used:.1%} used, "
            if len(self.uses) > 1:
                said += f"means of {len(self.uses)} stages, "
        return said + f"kurtosis of latents {self.before.kurtosis:.2f} before, {self.after.kurtosis:.2f} after"


def read_quantizer_analysis(path: Path) -> QuantizerAnalysis:
    """UsageError where quantizer.json is missing or damaged."""
    try:
        return QuantizerAnalysis.model_validate_json(path.read_bytes())
    except OSError:
        raise UsageError(f"{path}: not there; evaluate the forecasts with quantizer_samples") from None
    except ValidationError:
        raise UsageError(f"{path}: damaged; run the evaluate job again") from None
