"""Run Pallas Mosaic GPU kernels on no GPU: compiled for an H100, their PTX taken by `ptx_machine`, one after the other, where JAX calls them.

Needs the wheels jax-cuda13-plugin and jax-cuda13-pjrt in JAX's version, nothing else from NVIDIA.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import tempfile

import jax
import numpy as np
import ptx_machine
from jax.experimental.pallas import mosaic_gpu as plgpu

from gptoss_jax import devices


@contextlib.contextmanager
def on_machine(*, late: bool | str):
    """Let every kernel that is called run by its PTX, `late` as in `ptx_machine.Machine`; yields a list of how often each of a kernel's operations ran.

    Nothing else is compiled meanwhile: a kernel's arguments must be there.
    """
    original, ran = plgpu.kernel, []

    def kernel(body, *, out_type, **options):
        def call(*arguments):
            outputs, tree = jax.tree.flatten(out_type)
            arrays = [np.array(argument[...]) for argument in arguments]
            made = [np.frombuffer(np.random.default_rng(1).bytes(out.size * out.dtype.itemsize), out.dtype).reshape(out.shape).copy() for out in outputs]
            refs = [isinstance(argument, jax.Ref) for argument in arguments]
            ptx, log = _compiled(original(body, out_type=out_type, **options), arrays, refs)
            held = [array for array, is_ref in zip(arrays, refs) if is_ref]  # written where they are
            ran.append(ptx_machine.run(ptx, log, [*arrays, *made, *held], late=late))
            for argument, array, is_ref in zip(arguments, arrays, refs):
                if is_ref:
                    argument[...] = array
            return jax.tree.unflatten(tree, [jax.numpy.asarray(array) for array in made])

        return call

    plgpu.kernel = kernel
    try:
        with jax.disable_jit():
            yield ran
    finally:
        plgpu.kernel = original


def _compiled(run, arrays, refs):
    """Return (PTX, the passes' log) of a kernel on arguments like these."""
    place = jax.sharding.SingleDeviceSharding(devices.described("H100")[0])
    shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place) for array in arrays]

    def program(*arrays):
        given = [jax.new_ref(array) if is_ref else array for array, is_ref in zip(arrays, refs)]
        return run(*given), [ref[...] for ref, is_ref in zip(given, refs) if is_ref]

    with jax.disable_jit(False):
        lowered = jax.jit(program).lower(*shapes)
        if (key := lowered.as_text()) not in _SEEN:  # the compiler has a cache of its own, and dumps nothing the second time
            with tempfile.TemporaryDirectory() as folder:
                os.environ.update(MOSAIC_GPU_DUMP_TO=folder, MOSAIC_GPU_DUMP_PTX="1")
                try:
                    lowered.compile()
                finally:
                    del os.environ["MOSAIC_GPU_DUMP_TO"], os.environ["MOSAIC_GPU_DUMP_PTX"]
                ((ptx,), (log,)) = (list(pathlib.Path(folder).glob(pattern)) for pattern in ("*.ptx", "*.mlir-passes.log"))
                _SEEN[key] = ptx.read_text(), log.read_text()
    return _SEEN[key]


_SEEN: dict[str, tuple[str, str]] = {}
