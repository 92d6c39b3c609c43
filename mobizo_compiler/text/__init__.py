"""Rows of text into steps of a program: files, prompts, tokens, training with validation, evaluation, tuning.

Stands on `device`; models and tokenizers of transformers and data sets are optional packages.
"""
