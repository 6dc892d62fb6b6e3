"""Convolution, attention and matmuls in the forms in which CPUs are quick at them.

XLA hands matmuls to a tuned library there; other operations it compiles itself, several times
slower. So everything here is written as few, large matmuls, with backward passes of its own.
"""
