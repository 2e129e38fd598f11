"""The distillation toolkit: timm models and losses, trained with dtokd_kernels. `dtokd --help` starts it."""
