"""What the networks' layers compute, as functions of arrays.

Each module here picks the form that suits the device: JAX's and cuDNN's own on GPUs, those of
`ops.cpu` on CPUs, where XLA is quick at little else than large matrix products.
"""
