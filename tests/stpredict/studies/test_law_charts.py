"""What the charts of fitted laws show as measured, and what as extrapolation."""

import pytest
from synthetic_study import AXES, CURVE, sizes, study

from stpredict.studies.analyse import analyse
from stpredict.studies.config import AnalysisConfig
from stpredict.studies.law_charts import joint_chart
from stpredict.studies.look import look_of


def test_the_joint_law_is_dashed_wherever_a_size_has_no_points():
    late, early = CURVE[CURVE > 500], CURVE[CURVE <= 500]
    trials = [*study(sizes(3), 1, steps=early), *study(sizes(3, least=1e7), 1, steps=late)]
    (group,) = analyse(trials, AXES, AnalysisConfig(points="curve", bootstrap=0, curve_from=0)).groups
    tokens = {}
    for point in group.find("L(N, D)")[0].points:
        tokens.setdefault(point.size, []).append(point.tokens)
    panel = joint_chart(group, look_of(trials, AXES), "loss").axes[0]
    solid = [line.get_xdata() for line in panel.lines if line.get_linestyle() == "-"]
    assert [(x[0], x[-1]) for x in solid] == [pytest.approx((min(d), max(d))) for d in tokens.values()]
    dashed = [line.get_xdata() for line in panel.lines if line.get_linestyle() == "--"]
    first, last = min(map(min, tokens.values())), max(map(max, tokens.values()))
    assert len(dashed) == 2 * len(tokens)
    assert min(x[0] for x in dashed) == pytest.approx(first)
    assert max(x[-1] for x in dashed) == pytest.approx(3 * last)
