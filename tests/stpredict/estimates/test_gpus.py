"""GPUs by the names that people use."""

import pytest

from data_pipeline.errors import UsageError
from stpredict.estimates.gpus import DEFAULT, all_gpus, find_gpu, short_name
from stpredict.training.gpu_peaks import PEAKS


def test_every_gpu_whose_peak_is_known_has_memory_and_links():
    assert {gpu.name for gpu in all_gpus()} == set(PEAKS)


@pytest.mark.parametrize("name", ["a100-80g", "A100-80GB", "a100_80g", "a100", DEFAULT])
def test_a_gpu_is_found_by_its_short_name_and_by_torchs(name):
    gpu = find_gpu(name)
    assert (gpu.name, gpu.memory_gib, gpu.link, gpu.link_gb_s) == (DEFAULT, 80, "NVLink", 300)  # 600 both ways
    assert find_gpu(short_name(gpu)) == gpu


def test_an_unknown_gpu_is_answered_with_the_nearest():
    with pytest.raises(UsageError, match="--gpu a100-90g: not known; did you mean a100-80g"):
        find_gpu("a100-90g")
    with pytest.raises(UsageError, match="there are v100-16g, v100"):
        find_gpu("abacus")


def test_auto_is_bf16_and_a_gpu_without_it_says_so():
    assert find_gpu("a100").precision("auto") == "bf16"
    assert find_gpu("v100").precision("fp16") == "fp16"
    with pytest.raises(UsageError, match=r"training\.precision auto is bf16, which Tesla V100-SXM2-32GB"):
        find_gpu("v100").precision("auto")
