"""Teachers in diffusers' format: one file per family, and shared code."""
