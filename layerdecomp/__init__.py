"""Image layer decomposition by adapting an inpainting diffusion transformer."""

__version__ = "0.1.0"
