"""The networks of the EDM paper (Karras et al. 2022), and the checkpoints published with it."""
