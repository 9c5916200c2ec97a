"""How logits.npz was made: transformers' own float32 forward, eager attention, on the checkpoint beside this file.

    pip install torch transformers && python make_oracle.py
"""

import pathlib

import numpy as np
import torch
from transformers import GptOssConfig, GptOssForCausalLM, Mxfp4Config

here = pathlib.Path(__file__).parent
config = GptOssConfig.from_pretrained(here)
model = GptOssForCausalLM.from_pretrained(here, dtype=torch.float32, attn_implementation="eager",
                                          quantization_config=Mxfp4Config(dequantize=True)).float().eval()
ids = np.random.default_rng(11).integers(0, config.vocab_size, 150)
with torch.no_grad():
    logits = model(torch.as_tensor(ids)[None]).logits[0].numpy()
np.savez_compressed(here / "logits.npz", input_ids=ids.astype(np.int32), logits=logits.astype(np.float32))
