"""The latents of a data set, for trainers."""
