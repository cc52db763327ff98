"""Teachers in diffusers' format: one file per family, and what they share."""
