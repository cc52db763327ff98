"""Recipes: their entries, how they are read, and the objects that they stand for."""
