"""Matrix products of rows sorted by expert with each expert's own matrix, MXFP4 or dense."""

from gptoss_jax.kernels.expert_matmul.reference import Mxfp4Weight
from gptoss_jax.kernels.expert_matmul.xla import expert_matmul

__all__ = ["Mxfp4Weight", "expert_matmul"]
