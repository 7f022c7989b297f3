"""CLIP: images, their preprocessing, and the heads that classify them zero-shot."""
