"""Lowering through ExecuTorch, and its stock runtime. Shared by the backends that are delegates."""
