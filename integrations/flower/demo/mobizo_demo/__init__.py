"""A Flower app: a tiny classifier, learned by clients that see different classes."""
