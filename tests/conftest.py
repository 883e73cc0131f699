"""Shared fixtures."""

import pathlib

import pytest


@pytest.fixture(scope="session")
def scenes_dir(tmp_path_factory) -> pathlib.Path:
    """A data_dir with the drawn scenes prepared: 200 train and 40 val images of 192x256."""
    pytest.importorskip("tensorflow", reason="preparing records needs TensorFlow")
    from duc_dlc_jax.data.prepare import prepare

    folder = tmp_path_factory.mktemp("data")
    prepare("scenes", None, folder)
    return folder
