"""`bdkd tune`: searches over a recipe, on Ray Tune."""
