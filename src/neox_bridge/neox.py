"""Hugging Face models inside GPT-NeoX: ``import neox_bridge.neox`` in the training script.

The import registers the keys of ``training.keys`` in GPT-NeoX's argument check and wraps two of its
functions, ``load_checkpoint`` and ``save_checkpoint`` of ``megatron.checkpointing``. It needs
GPT-NeoX's source tree on ``sys.path``, as its own scripts have it.
"""

from neox_bridge.training.hooks import install

install()
