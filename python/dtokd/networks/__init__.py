"""Networks for 32 x 32 images as the CIFAR-100 benchmark of CRD and mdistiller defines them.

Importing this package registers them with timm: `timm.create_model("cifar_resnet20", num_classes=100)`.
"""

from . import cifar

__all__ = ["cifar"]
