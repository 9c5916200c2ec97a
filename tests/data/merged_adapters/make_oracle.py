"""How logits.npz was made: transformers' own float32 forward, eager attention, on what `test_lora.merged` exports.

    PYTHONPATH=tests:. python -c "import test_lora; test_lora.merged('/tmp/merged')"
    pip install torch transformers && python make_oracle.py /tmp/merged
"""

import pathlib
import sys

import numpy as np
import torch
from transformers import GptOssConfig, GptOssForCausalLM, Mxfp4Config

config = GptOssConfig.from_pretrained(sys.argv[1])
model = GptOssForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, attn_implementation="eager",
                                          quantization_config=Mxfp4Config(dequantize=True)).float().eval()
ids = np.random.default_rng(12).integers(0, config.vocab_size, 150)
positions = np.arange(4, 150, 9)
with torch.no_grad():
    logits = model(torch.as_tensor(ids)[None]).logits[0, positions].numpy()
np.savez_compressed(pathlib.Path(__file__).parent / "logits.npz", input_ids=ids.astype(np.int32), positions=positions, logits=logits.astype(np.float32))
