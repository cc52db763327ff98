"""What is trained on: data sets of images, prompts, noise-image pairs."""
