"""Convolution, attention and matrix products in the forms in which CPUs are quick at them.

XLA hands matrix products to a tuned library there; other operations it compiles itself, several
times slower. So everything here is written as few, large products, with backward passes of its
own.
"""
