"""Fixtures that several packages' tests share."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real data sets that STPREDICT_TEST_DATA names; skips without it."""
    folder = os.environ.get("STPREDICT_TEST_DATA")
    if not folder:
        pytest.skip("needs real videos: set STPREDICT_TEST_DATA to a folder with weizmann/ and awkward/")
    return Path(folder)
