"""A class for every pixel, or a mask for every object: UperNet and Mask2Former on transformers' heads.

task.py     the sections `semantic`, `query_segmentation` and `query_instance`, their readers and evaluations
pyramid.py  UperNet as one module: batch in, loss out
queries.py  Mask2Former as one module        criterion.py  its losses for many ranks
"""
