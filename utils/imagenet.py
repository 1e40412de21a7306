"""Facts about ImageNet."""

IMAGENET_22K_CLASSES = 21841  # of the fall 2011 release, on which the released 22K models were trained
