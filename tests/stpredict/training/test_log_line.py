from stpredict.training.log_line import log_line

VALUES = {
    "loss": 0.51234567,
    "l2": 0.51234567,
    "accuracy": 0.25,
    "grad_norm": 1.5,
    "lr": 1e-4,
    "samples_per_s": 41.23456,
    "data_wait_share": 0.01,
    "samples_replaced": 0,
    "rss_gb": 1.0,
}


def test_a_line_is_short_and_says_a_value_once():
    line = log_line(VALUES, ["l2", "accuracy"])
    assert line == "loss 0.5123  accuracy 0.25  lr 0.0001  grad_norm 1.5  41.23 samples/s"


def test_what_is_amiss_is_on_the_line():
    line = log_line(VALUES | {"data_wait_share": 0.4, "samples_replaced": 3, "mfu": 0.381, "tokens_per_s": 9e4}, [])
    assert line.endswith("41.23 samples/s  MFU 38%  40% waiting for data  3 samples replaced")
    assert log_line(VALUES | {"tokens_per_s": 12_345.6}, []).endswith("12,346 tokens/s")
