"""Building the C++ kernels: in a cache of its own each, from Python processes that start like a user's."""

import os
import shutil
import subprocess
import sys

import pytest

from gptoss_jax.kernels import cpu_library

COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
PROGRAM = """
import jax.numpy as jnp
from gptoss_jax.kernels.dense_matmul import dense_matmul
print(float(dense_matmul(jnp.ones((1, 64), jnp.bfloat16), jnp.ones((3, 64), jnp.bfloat16){})[0, 0]))
"""


def start(cache, program=PROGRAM.format(""), **environment):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": os.fspath(cache), **environment}
    return subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def outcome(process):
    out, error = process.communicate(timeout=120)
    return process.returncode, out.strip(), error


@needs_compiler
def test_two_processes_build_at_once_and_a_damaged_file_is_built_again(tmp_path):
    for process in [start(tmp_path), start(tmp_path)]:
        assert outcome(process)[:2] == (0, "64.0")
    (library,) = (tmp_path / "gptoss_jax" / "kernels").iterdir()  # nothing temporary is left
    whole = library.read_bytes()
    library.write_bytes(whole[: len(whole) // 2])
    code, out, error = outcome(start(tmp_path))
    assert (code, out) == (0, "64.0") and error.count("building the CPU kernels") == 1
    (library,) = (tmp_path / "gptoss_jax" / "kernels").iterdir()
    assert "building" not in outcome(start(tmp_path))[2]


def test_without_a_compiler_xla_serves_and_one_line_says_so(tmp_path):
    code, out, error = outcome(start(tmp_path, PATH="", CXX=""))
    assert (code, out) == (0, "64.0")
    assert error.count("\n") == 1 and "no C++ compiler found" in error


def test_a_forced_kernel_without_a_compiler_is_an_error(tmp_path):
    code, _, error = outcome(start(tmp_path, PROGRAM.format(", implementation='cpu'"), PATH="", CXX=""))
    assert code == 1 and "BuildError: no C++ compiler found" in error


@needs_compiler
def test_a_failed_build_repeats_the_compilers_own_words(tmp_path, monkeypatch):
    (tmp_path / "source").mkdir()
    broken = tmp_path / "source" / "library.cc"
    broken.write_text("int broken = missing_name;\n")
    monkeypatch.setattr(cpu_library, "_SOURCE", broken)
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path))
    with pytest.raises(cpu_library.BuildError, match="missing_name"):
        cpu_library._built()
