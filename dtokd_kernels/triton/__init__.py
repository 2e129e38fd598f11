"""The Triton kernels: the backend of a GPU on which no compiler was at hand when this package was installed."""
