"""Lowering through ExecuTorch, and its stock runtime: what the backends that are its delegates share.

Knows none of them.
"""
