"""By hand: 20 steps on every mesh that eight devices make, in each mode and with each transport, against one device.

    python tests/every_mesh.py [PART PARTS]      prints a line for each run; about 20 minutes of one core for all

Two layers, one of each kind of attention, of sizes that every mesh divides. Losses are compared relatively, to 1e-5; largest seen: 4.8e-7.
Quantised training has a rate of 1e-4 (`configs/qat_20b.yaml`: 5e-6). With 1e-3 a few weights of ten thousands come to lie in the middle between
two numbers of the grid, where the last bit decides; as one such weight can send a token to another expert, losses then differ by 2e-4, on
one device in eight microbatches as much as on a mesh.
"""

import itertools
import math
import pathlib
import sys
import tempfile
import time

import conftest  # noqa: F401 (eight devices)
import jax
import numpy as np
from test_step import save_checkpoint
from test_training_sharding import losses_of

from gptoss_jax.config import FULL, SLIDING, GptOssConfig
from gptoss_jax.training.config import MeshConfig

MODEL = GptOssConfig(vocab_size=320, hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_local_experts=8, num_experts_per_tok=2,
                     num_attention_heads=16, num_key_value_heads=8, head_dim=12, sliding_window=7, layer_types=(SLIDING, FULL))
MESHES = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=5) if math.prod(sizes) == 8]
QAT = [(8, 1, 1, 1, 1), (1, 8, 1, 1, 1), (1, 1, 8, 1, 1), (1, 1, 1, 8, 1), (1, 1, 1, 1, 8), (1, 2, 2, 2, 1), (1, 1, 2, 2, 2)]
RATE = {"full": 1e-3, "lora": 1e-3, "qat": 1e-4}


def runs():
    """Yield (mode, mesh, transport)."""
    for mode in ("full", "lora", "qat"):
        for sizes in MESHES if mode != "qat" else QAT:
            mesh = MeshConfig(*sizes)
            for transport in ("gather", "all_to_all")[: 2 if mesh.expert > 1 else 1]:
                yield mode, mesh, transport


def main(part=0, parts=1):
    jax.config.update("jax_disable_most_optimizations", True)
    path = save_checkpoint(pathlib.Path(tempfile.mkdtemp()) / "checkpoint", MODEL)
    expected, failed = {}, False
    for mode, mesh, transport in list(runs())[part::parts]:
        if mode not in expected:
            expected[mode] = losses_of(path, learning_rate=RATE[mode], mode=mode)
        began = time.monotonic()
        found = losses_of(path, mesh, RATE[mode], mode=mode, expert_transport=transport)
        difference = np.abs(found / expected[mode] - 1).max()
        failed |= difference > 1e-5
        axes = " x ".join(f"{axis} {size}" for axis, size in vars(mesh).items() if size > 1)
        mark = "!" if difference > 1e-5 else " "
        print(f"{mark} {mode:4} {axes:36} {transport:10} {difference:.1e}  {time.monotonic() - began:4.1f} s", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
