import pytest

from data_pipeline.config import ClipChanges, ClipConfig
from data_pipeline.errors import UsageError
from stpredict.exports import TokenizerExport
from stpredict.tokenizers.clips import clip_for
from stpredict.tokenizers.config import CausalCnnConfig

TRAINED_ON = ClipConfig(frames=5, size=(16, 16), fps=8, crop="random", short_side=20)


@pytest.fixture
def export():
    model = CausalCnnConfig(channels=(8, 8), blocks=(0, 0), strides=((2, 2, 2),), groups=8, levels=(4, 4))
    return TokenizerExport(clip=TRAINED_ON, model=model)


def test_what_is_not_changed_of_a_clip_is_as_the_tokenizer_was_trained_on(export):
    assert clip_for(ClipChanges(), TRAINED_ON, export, "data.clip") == TRAINED_ON
    changed = clip_for(ClipChanges(start="centre"), TRAINED_ON, export, "data.clip")
    assert changed == TRAINED_ON.model_copy(update={"start": "centre"})


def test_changes_that_make_no_clip_or_one_that_does_not_fit_are_refused(export):
    with pytest.raises(UsageError, match=r"data\.clip.*short_side 20 is less than size"):
        clip_for(ClipChanges(size=(32, 32)), TRAINED_ON, export, "data.clip")
    with pytest.raises(UsageError, match="it takes 1 \\+ 2n frames"):
        clip_for(ClipChanges(frames=4), TRAINED_ON, export, "data.clip")
