"""Objects as boxes, with masks or without: Faster R-CNN and Mask R-CNN on torchvision's heads, Deformable DETR.

task.py     the sections `detection`, `instance` and `query_detection`, their readers and evaluations
regions.py  torchvision's FPN, RPN and RoI heads as one module: batch in, losses out
heads.py    these heads with keyed sampling and the joined batch's averages
queries.py  transformers' Deformable DETR as one module
"""
