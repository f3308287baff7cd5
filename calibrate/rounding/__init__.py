"""Rounding the linears that share an input: output matching, GPTQ, Kronecker-factored rounding."""
