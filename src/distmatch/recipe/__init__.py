"""Recipes: their entries, how they are read, and the objects built from them."""
