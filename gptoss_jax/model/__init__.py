"""The gpt-oss transformer.

Suffixes of local arrays name their dims: B batch, T query tokens, S key slots, D model width, N query heads, K key-value heads,
G = N/K query heads a key-value head, H head width, E experts, A active experts, F expert hidden, M routed rows, V vocabulary,
C MXFP4 blocks.
"""

from gptoss_jax.model.cache import Cache, make_cache
from gptoss_jax.model.transformer import GptOss

__all__ = ["Cache", "GptOss", "make_cache"]
