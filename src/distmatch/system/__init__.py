"""The machine: files, processes, the terminal, memory and its limits. Nothing of diffusion."""
