"""What authors of backends and passes test with: small models, a zoo of architectures, and the oracle.

`zoo()` needs transformers, which is imported when a model is built.
"""

from mobizo_compiler.testing.models import TinyCausalLM, TokenWise, tiny_batch

__all__ = ["TinyCausalLM", "TokenWise", "tiny_batch"]
