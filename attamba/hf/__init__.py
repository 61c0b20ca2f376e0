"""Attamba models in Hugging Face's transformers: one wrapper around the one decoder.

Importing this package registers the architecture "attamba" with the Auto classes. It needs the
extra `attamba[hf]`.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from attamba.hf.cache import AttambaCache
from attamba.hf.configuration import AttambaConfig
from attamba.hf.modeling import AttambaForCausalLM, AttambaModel

__all__ = ["AttambaCache", "AttambaConfig", "AttambaForCausalLM", "AttambaModel"]

AutoConfig.register(AttambaConfig.model_type, AttambaConfig, exist_ok=True)
AutoModel.register(AttambaConfig, AttambaModel, exist_ok=True)
AutoModelForCausalLM.register(AttambaConfig, AttambaForCausalLM, exist_ok=True)
