"""Latents of a data set, in the formats of trainers."""
