"""How frozen weights are stored in few bits."""
