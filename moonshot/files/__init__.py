"""Models and text on disk: load, map, save, and what pruning them will take."""
