"""From a captured graph to a lowered program: pipelines, manifest, checks, cache."""
