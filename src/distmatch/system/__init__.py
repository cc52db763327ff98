"""The machine: files, processes, the terminal, memory and its limits. Nothing here knows about diffusion."""
