"""Quantizers, observers, the Hessian of inputs; equalization and clipping ranges by expected error."""
