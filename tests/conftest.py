"""Every test runs on 8 CPU devices, as do the processes that it starts; strict dtype promotion; warnings are errors (pyproject.toml)."""

import os
import pathlib

os.environ["JAX_PLATFORMS"], os.environ["JAX_NUM_CPU_DEVICES"] = "cpu", "8"

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")

DATA = pathlib.Path(__file__).parent / "data"


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """What one test has compiled serves the next, in this process and in those it starts; the user's own programs are left alone."""
    with pytest.MonkeyPatch.context() as patch:
        directory = str(tmp_path_factory.mktemp("compiled"))
        patch.setenv("JAX_COMPILATION_CACHE_DIR", directory)
        jax.config.update("jax_compilation_cache_dir", directory)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        yield


@pytest.fixture(scope="module")
def quickly_compiled():
    """Most programs of tests take longer to compile than to run, here and in the processes that tests start; those of commands are
    compiled as they are for users."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", True)
        jax.clear_caches()  # or programs that other modules have compiled serve, which differ in the last bit from those of the processes
        yield
        jax.config.update("jax_disable_most_optimizations", False)
        jax.clear_caches()


@pytest.fixture(scope="session", autouse=True)
def races_raise():
    """A race that an interpreted kernel is looked for fails: before jax 0.12 it is printed, remembered, and nobody asks."""
    if not (0, 11, 2) <= jax.__version_info__ < (0, 12):  # older ones don't take the kernels
        yield
        return
    from jax._src.pallas.mosaic.interpret.race_detection_state import RaceDetectionState

    def remember(state, found):
        if found:
            raise RuntimeError("RACE DETECTED, printed above")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RaceDetectionState, "races_found", property(lambda state: False, remember))
        yield


@pytest.fixture(scope="session")
def shared():
    """The folder of reference data made by other implementations; tests that need the whole of it skip without it."""
    path = pathlib.Path(os.environ.get("GPTOSS_JAX_REFERENCE", pathlib.Path(__file__).parents[2] / "shared"))
    if not (path / "oracle").is_dir():
        pytest.skip("reference data not here: set GPTOSS_JAX_REFERENCE to its folder")
    return path
