"""What the guards decide, loss by loss."""

import logging

import pytest

from data_pipeline.errors import UserError
from stpredict.training.config import GuardsConfig, SpikeConfig
from stpredict.training.guards import FEWEST, Guards, GuardState

NAN = float("nan")
RISING = [1 + n / 100 for n in range(20)]


def guards(**spike) -> Guards:
    return Guards(GuardsConfig(spike=SpikeConfig(action="skip", **spike)))


def after(losses: list[float], **spike) -> Guards:
    """Guards that have seen them, all taken."""
    made = guards(**spike)
    for step, loss in enumerate(losses):
        assert not made.refuses(step, loss, finite=True)
        made.took(step, applied=True)
    return made


@pytest.mark.parametrize(
    ("before", "loss", "spike"),
    [
        (RISING, 1.83, False),  # by hand: 1.095 + 10 x 1.4826 x 0.05 = 1.8363
        (RISING, 1.84, True),
        (RISING, -9.0, False),  # far below is none
        ([loss - 3 for loss in RISING], -1.17, False),
        ([loss - 3 for loss in RISING], -1.16, True),
        ([2.0] * 20, 2.019, False),  # a constant loss has no deviation: a thousandth of it stands in
        ([2.0] * 20, 2.021, True),
        ([0.0] * 20, 1e-3, False),  # how much is far from nothing, nothing tells
        ([1.0] * (FEWEST - 1), 1e9, False),
        ([1.0] * FEWEST, 1e9, True),
    ],
)
def test_a_spike_is_what_is_far_above_the_usual_loss(before, loss, spike):
    assert after(before).refuses(len(before), loss, finite=True) == spike


def test_only_the_last_window_counts_and_nothing_of_skipped_steps():
    made = after([99 + loss for loss in RISING], window=10)
    for step in range(13):  # the level falls
        assert not made.refuses(step, 1 + step / 12, finite=True)
        made.took(step, applied=True)
    assert len(made.state.losses) == 10
    assert max(made.state.losses) == 2.0
    assert made.refuses(13, 100.0, finite=True)
    made.took(13, applied=False)
    assert max(made.state.losses) == 2.0
    assert made.state.steps_skipped == made.state.bad_in_a_row == 1


def test_a_step_that_is_not_finite_is_refused_and_its_loss_forgotten():
    made = after([1.0] * 20)
    for loss, finite in ((NAN, True), (float("inf"), True), (1.0, False)):
        assert made.refuses(20, loss, finite)
        made.took(20, applied=False)
    assert made.state.losses == [1.0] * 20
    assert made.state.bad_in_a_row == 3
    assert GuardState.model_validate_json(made.state.model_dump_json()) == made.state


@pytest.mark.parametrize(
    ("loss", "finite", "why"),
    [
        (NAN, True, "its loss is nan"),
        (1.0, False, "a loss or gradient of the discriminator is not finite"),
        (9.0, True, "its loss is a spike"),
        (1.0, True, "its gradient is not finite"),
    ],
)
def test_what_is_said_of_a_skipped_step_is_what_was_wrong_with_it(caplog, loss, finite, why):
    made = after([1.0] * 20)
    made.refuses(20, loss, finite)
    made.took(20, applied=False)
    assert f"step 21 was skipped: {why} (1 in a row)" in caplog.text


def test_one_rank_warns_and_the_others_files_have_it(caplog):
    caplog.set_level(logging.INFO)
    made = Guards(GuardsConfig(), logging.INFO)
    made.refuses(0, NAN, finite=True)
    made.took(0, applied=False)
    assert [record.levelno for record in caplog.records] == [logging.INFO]


def test_bad_steps_in_a_row_lead_back_and_a_good_one_between_does_not():
    made = Guards(GuardsConfig(max_bad_steps=2, max_rollbacks=2))
    for applied in (False, True, False):
        made.took(0, applied)
        assert not made.must_roll_back
    made.took(0, applied=False)
    assert made.must_roll_back
    made.rolled_back(GuardState(losses=[1.0], bad_in_a_row=1), 4)
    assert not made.must_roll_back
    assert made.state == GuardState(steps_skipped=3, rollbacks=1, losses=[1.0])
    made.rolled_back(GuardState(), 4)
    made.rolled_back(GuardState(), 6)  # another checkpoint: it has come further
    made.rolled_back(GuardState(), 6)
    with pytest.raises(UserError, match=r"for the 3\. time since the checkpoint of step 6"):
        made.rolled_back(GuardState(), 6)
