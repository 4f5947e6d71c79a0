"""Editing pictures with ready diffusion models: samplers by known names, masked content, crops, reference attention."""
