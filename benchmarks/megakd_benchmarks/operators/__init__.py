"""Each operator of megakd_kernels beside what one would write or install instead, from inputs to gradients."""
