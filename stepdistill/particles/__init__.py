"""Optimising images, latents or a renderer's parameters by score gradients (losses/score.py)."""
