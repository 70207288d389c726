"""KeySync in JAX: two-stage latent video diffusion for lip synchronisation."""

__version__ = "0.1.0.dev0"
