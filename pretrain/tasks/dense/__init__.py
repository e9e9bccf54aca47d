"""What the tasks on boxes, masks and label maps share: they stand on it, and it knows none of them.

section.py  their `task:` section: frozen stages, the set that they need (no torch)
module.py   DenseModule: the image model, its pyramid of features in fp32, a shape for all ranks
fp32.py     layers that compute in fp32 whatever their parameters are kept in; BatchNorm over all ranks
sampling.py draws that belong to the sample, for the heads of torchvision and transformers
borrowed.py the image model as the backbone of a transformers model, without being a part of it
"""
