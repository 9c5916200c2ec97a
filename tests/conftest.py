"""Every test runs on 8 CPU devices, with strict dtype promotion; warnings are errors (pyproject.toml)."""

import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")

DATA = pathlib.Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def shared():
    """The folder of reference data made by other implementations; tests that need the whole of it skip without it."""
    path = pathlib.Path(os.environ.get("GPTOSS_JAX_REFERENCE", pathlib.Path(__file__).parents[2] / "shared"))
    if not (path / "oracle").is_dir():
        pytest.skip("reference data not here: set GPTOSS_JAX_REFERENCE to its folder")
    return path
