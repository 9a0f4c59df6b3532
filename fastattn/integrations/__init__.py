"""Adapters for existing models. Import each module by its own name; importing one changes nothing.

- ``fastattn.integrations.transformers``: ``attn_implementation="fastattn"``
- ``fastattn.integrations.torch``: ``F.scaled_dot_product_attention`` and torch's flash-attention registry
- ``fastattn.integrations.flash_attn``: the functions of the flash-attn package, under their names
- ``fastattn.integrations.tensor_parallel``: sharding rules for DTensor
- ``fastattn.integrations.context_parallel``: ring and all-to-all attention over rows sharded across ranks
"""
