"""Building the CPU kernels: once, whole, for this processor; and a clear word where that can't be."""

import concurrent.futures
import logging
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax import mxfp4
from gptoss_jax.kernels import cpu_library
from gptoss_jax.kernels.dense_matmul import dense_matmul
from gptoss_jax.kernels.expert_matmul import Mxfp4Weight, expert_matmul

PROGRAM = """
import jax, jax.numpy as jnp
from gptoss_jax.kernels.dense_matmul import dense_matmul
x = jnp.arange(12, dtype=jnp.float32).reshape(3, 4)
print(jax.jit(dense_matmul)(x, jnp.ones((2, 4), jnp.bfloat16)).tolist())
"""


def start(cache, program=PROGRAM, **environment):
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(cache)} | environment)


def finish(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out, err


@pytest.fixture
def built(tmp_path):
    """What was built for this processor, in a cache of a test's own."""
    (cache := tmp_path / "gptoss_jax").mkdir()
    return pathlib.Path(shutil.copy(cpu_library.build(cpu_library.cache_directory()), cache))


def copying_compiler(built, before=":"):
    """Return a compiler that only copies what was built, after a line of the shell: most of a build's seconds are its compiler's."""
    folder = built.parents[1]
    (folder / "original").write_bytes(built.read_bytes()[: -cpu_library._DIGEST])
    compiler = folder / "compiler"
    compiler.write_text(f"#!/bin/sh\n[ \"$1\" = --version ] && exec c++ --version\nfor last; do :; done\n{before}\nexec cp {folder}/original \"$last\"\n")
    compiler.chmod(0o700)
    return str(compiler)


def test_two_processes_on_an_empty_cache_both_compute_and_leave_one_whole_file(built, tmp_path):
    """Each is compiling when the other is."""
    whole = built.read_bytes()
    compiler = copying_compiler(built, f"touch {tmp_path}/compiling-$$; while set -- {tmp_path}/compiling-*; [ $# -lt 2 ]; do sleep 0.01; done")
    built.unlink()
    for out, err in map(finish, [start(tmp_path, CXX=compiler), start(tmp_path, CXX=compiler)]):
        assert out == "[[6.0, 6.0], [22.0, 22.0], [38.0, 38.0]]\n"
        assert err.startswith("building the CPU kernels") and err.count("\n") == 1
    assert [path.read_bytes() for path in built.parent.glob("*")] == [whole] and built.exists()


def test_without_a_compiler_one_line_says_so_and_xla_computes(tmp_path):
    out, err = finish(start(tmp_path, CXX="no-such-compiler"))
    assert out == "[[6.0, 6.0], [22.0, 22.0], [38.0, 38.0]]\n"
    assert err == "CPU kernels not available, using XLA's, which are slower: no C++ compiler found (tried no-such-compiler)\n"


def test_a_build_is_found_again(built, caplog):
    with caplog.at_level(logging.INFO, "gptoss_jax"):
        assert cpu_library.build(built.parent) == built
    assert not caplog.records


@pytest.mark.parametrize("damage", [lambda content: content[:5000], lambda content: b"", lambda content: b"#!/bin/sh\nexit 0\n" * 100,
                                    lambda content: content[:-1] + b"x"], ids=["truncated", "empty", "foreign", "altered"])
def test_a_damaged_file_is_built_again(built, damage, monkeypatch):
    whole = built.read_bytes()
    monkeypatch.setenv("CXX", copying_compiler(built))
    built.write_bytes(damage(whole))
    assert cpu_library.build(built.parent) == built
    assert built.read_bytes() == whole


def test_a_failing_compiler_is_quoted_and_leaves_nothing(tmp_path, monkeypatch):
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'cpu.cc:1: error: no such instruction' >&2\nexit 3\n")
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(cpu_library.CpuLibraryError, match=r"exit status 3 on cpu.cc\n.*no such instruction"):
        cpu_library.build(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(cpu_library.CpuLibraryError, match="file.*no place to keep the built kernels"):
        cpu_library.build(tmp_path / "file")


def test_without_a_home_there_is_no_place_for_built_files(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pathlib.Path, "home", home)
    with pytest.raises(cpu_library.CpuLibraryError, match="Could not determine home directory. Set HOME or XDG_CACHE_HOME"):
        cpu_library.cache_directory()


@pytest.mark.parametrize("change", ["version", "processor", "source", "architecture"])
def test_another_compiler_processor_or_source_has_another_file(change, built, tmp_path, monkeypatch):
    """The compiler fails here, so that a build which isn't found in the cache is seen."""
    version = cpu_library._compiler()[1]
    monkeypatch.setattr(cpu_library, "_compiler", lambda: ("/bin/false", "another" if change == "version" else version))
    if change == "processor":
        monkeypatch.setattr(cpu_library, "_processor", lambda: "flags: none")
    elif change == "source":
        (tmp_path / "cpu.cc").write_text("int main() {}\n")
        monkeypatch.setattr(cpu_library, "SOURCE", tmp_path / "cpu.cc")
    with pytest.raises(cpu_library.CpuLibraryError, match="/bin/false failed with exit status 1"):
        cpu_library.build(built.parent, "x86-64" if change == "architecture" else None)


def test_threads_that_ask_at_once_register_them_once(monkeypatch):
    cpu_library.load()  # so that there is nothing left to register afterwards, which again would be an error
    calls = []
    monkeypatch.setattr(cpu_library, "build", lambda directory: time.sleep(0.05))
    monkeypatch.setattr(cpu_library, "register", lambda *_: calls.append(1))
    cpu_library._load.cache_clear()
    try:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: cpu_library.load(), range(4)))
        assert calls == [1]
    finally:
        cpu_library._load.cache_clear()
        cpu_library.load()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86-64")
@pytest.mark.parametrize("architecture", ["x86-64", "x86-64-v3", None], ids=str)
def test_every_instruction_set_gives_the_same_products(architecture, built, tmp_path, monkeypatch):
    """Without AVX, with AVX2, and with all that this processor has."""
    cpu_library.load()  # which registers the functions once, under the name they have now
    cpu_library.register(f"test_{architecture}", cpu_library.build(tmp_path, architecture) if architecture else built)
    monkeypatch.setattr(cpu_library, "_PREFIX", f"test_{architecture}")
    random = np.random.default_rng(0)
    sizes = jnp.asarray([3, 0, 100, 1], jnp.int32)
    weight = Mxfp4Weight(*(jnp.asarray(part) for part in mxfp4.encode(random.standard_normal((4, 13, 96)).astype(np.float32))))
    weight = weight._replace(scales=weight.scales.at[:, 0, 0].set(0).at[:, 1, 1].set(1))  # outside the fast paths
    bias = jnp.asarray(random.standard_normal((4, 13)), jnp.float32)
    matrix, row = jnp.asarray(random.standard_normal((11, 45)), jnp.bfloat16), jnp.asarray(random.standard_normal((5, 45)), jnp.float32)
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jnp.asarray(random.standard_normal((106, 96)), dtype)
        ours = expert_matmul(x, weight, bias, sizes, implementation="cpu").astype(jnp.float32)
        theirs = expert_matmul(x, weight, bias, sizes, implementation="reference").astype(jnp.float32)
        np.testing.assert_allclose(ours, theirs, rtol=2**-7 if dtype == jnp.bfloat16 else 0, atol=3e-5)
        ours = dense_matmul(row.astype(dtype), matrix, dtype=jnp.float32, implementation="cpu")
        np.testing.assert_allclose(ours, dense_matmul(row.astype(dtype), matrix, dtype=jnp.float32, implementation="xla"), atol=3e-5)


def test_the_thread_settings_of_openmp_are_honoured(monkeypatch):
    for value, expected in (("", 0), ("3", 3), ("2,1", 2), ("many", 0)):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert cpu_library._max_threads() == expected


def test_one_core_is_enough(tmp_path):
    core = min(os.sched_getaffinity(0))
    process = start(pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")), f"import os\nos.sched_setaffinity(0, {{{core}}})\n{PROGRAM}")
    assert finish(process)[0] == "[[6.0, 6.0], [22.0, 22.0], [38.0, 38.0]]\n"
