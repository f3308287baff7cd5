"""Quantizers, observers, the input Hessian, equalization, and clipping ranges by output error or expected error."""
