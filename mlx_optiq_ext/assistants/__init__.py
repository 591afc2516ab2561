"""The assistants of Gemma-4 models, which are small decoders that draft for them.

A checkpoint is a folder or a Hub id whose ``config.json`` has one of the model types
``gemma4_assistant`` and ``gemma4_unified_assistant``. The checkpoint may have

* full weights, or weights quantised in any way that mlx-lm can load;
* heads over the tied embeddings, over their own, and over the tokens of the best
  centroids only (``use_ordered_embeddings``);
* head sizes per layer (``per_layer_config``) and per type of layer
  (``global_head_dim``);
* ``suppress_tokens`` of ``generation_config.json``, which are never drafted.
"""

from ._load import MODEL_TYPES, load_assistant
from ._model import Assistant, AssistantArgs, SharedKV

__all__ = ["MODEL_TYPES", "Assistant", "AssistantArgs", "SharedKV", "load_assistant"]
