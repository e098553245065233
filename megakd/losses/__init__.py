"""Which divergence, over which tokens, with which weight: the kernels compute it."""
