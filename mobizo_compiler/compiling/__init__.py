"""From a captured graph to a lowered program: methods, manifest, checks of what was lowered, the cache.

One of two towers: it stands on passes and backends, and knows nothing of `device` and `text`.
"""
