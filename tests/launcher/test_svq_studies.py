"""The studies in the shape of SVQ's tables: they load, at the published and at a small size, and vary what they say."""

import json
from functools import cache
from pathlib import Path

import pytest

from launcher.study import load_study
from stpredict.config import load
from stpredict.estimates.planned import plan_training
from stpredict.jobs.config import EvaluateConfig, ForecastConfig, ForecasterJobConfig

ROOT = Path(__file__).parents[2]
TABLES = ("cells", "translators", "quantizers", "equal_codebooks", "codebooks", "initialisations")
#: Axis that is compared → its values, at the small size.
COMPARED = {
    "cells": ("quantizer", 2),
    "translators": ("translator", 4),
    "quantizers": ("quantizer", 10),
    "equal_codebooks": ("quantizer", 10),
    "codebooks": ("codebook", 9),
    "initialisations": ("codebook", 9),
}


@cache
def trainings_of(name: str) -> tuple[dict, list[ForecasterJobConfig], list]:
    """Of one seed: loading hundreds of configs takes a while."""
    path = ROOT / f"configs/studies/svq_{name}.yaml"
    study, _, jobs = load_study(path, ["vars.field=/field", "grid.seed.values=[0]"])
    return study.grid, [job.config for job in jobs if isinstance(job.config, ForecasterJobConfig)], jobs


@pytest.mark.parametrize("table", TABLES)
def test_the_published_size_varies_what_the_small_one_does(table):
    small, full = trainings_of(f"{table}_tiny")[0], trainings_of(table)[0]
    assert list(small) == list(full)
    axis, count = COMPARED[table]
    assert len(small[axis].values) == count
    assert len(full[axis].values) == (12 if table == "translators" else count)
    for other in small.keys() - {axis}:
        assert list(small[other].values) == list(full[other].values)


@pytest.mark.parametrize("table", TABLES)
def test_every_value_is_trained_with_either_loss_so_that_two_changes_are_told_apart(table):
    _, trainings, _ = trainings_of(f"{table}_tiny")
    of_model: dict[str, set] = {}
    for config in trainings:
        of_model.setdefault(config.model.model_dump_json(), set()).add((config.loss.mse, config.loss.mae))
    assert set(map(frozenset, of_model.values())) == {frozenset({(1, 0), (0, 1)})}
    assert {json.loads(model)["quantizer"] is None for model in of_model} == {True, False}
    if table == "translators":
        models = [json.loads(model) for model in of_model]
        cells = {(model["translator"]["kind"], model["quantizer"] is None) for model in models}
        assert len(cells) == len(models) == 8


@pytest.mark.parametrize("table", [f"{table}{size}" for table in TABLES for size in ("", "_tiny")])
def test_the_model_of_every_trial_can_be_built_and_is_forecast_and_evaluated(table):
    _, trainings, jobs = trainings_of(table)
    models = {config.model.model_dump_json(): config for config in trainings}
    for config in models.values():
        assert plan_training(config).task.model.config == config.model
    if not table.endswith("_tiny"):
        assert {(m.input_frames, m.hid_T, m.N_T) for m in (c.model for c in trainings)} == {(12, 256, 8)}
    if table == "translators":
        sizes = [sum(p.numel() for p in plan_training(config).task.model.parameters()) for config in models.values()]
        assert {12_758_305, 14_372_529} <= set(sizes)  # gSTA without and with SVQ, as published
    forecasts = {job.config.run for job in jobs if isinstance(job.config, ForecastConfig)}
    evaluated = {job.config.generated for job in jobs if isinstance(job.config, EvaluateConfig)}
    assert len(trainings) == len(forecasts)
    assert forecasts == evaluated
    assert all(config.training.export == "best" for config in trainings)


def trained_as(config: ForecasterJobConfig) -> tuple:
    return config.model.translator, config.training.optimizer, config.training.schedule


@pytest.mark.parametrize("table", TABLES)
def test_at_the_published_size_a_translator_is_trained_as_its_own_config_says(table):
    _, trainings, _ = trainings_of(table)
    kinds = {config.model.translator.kind for config in trainings}
    assert len(kinds) == (12 if table == "translators" else 1)
    published = {}
    for kind in kinds:
        path = ROOT / f"configs/forecasters/weatherbench_s_t2m_{kind}.yaml"
        published[kind] = trained_as(load(ForecasterJobConfig, path))
    for config in trainings:
        assert trained_as(config) == published[config.model.translator.kind]
