"""How frozen weights are stored in few bits: the recipes, and what a stored weight is made of.

It speaks of tensors alone, and imports neither graphs nor options of others.
"""

from mobizo_compiler.quantization.weights import QuantizationConfig, StoredWeight, default_eps

__all__ = ["QuantizationConfig", "StoredWeight", "default_eps"]
