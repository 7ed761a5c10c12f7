"""How fast a model runs here, and how fast other programs run the same weights."""
