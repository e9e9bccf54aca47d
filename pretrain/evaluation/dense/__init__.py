"""Scores and predictions of dense tasks, on whole pictures.

views       a picture as a module is given it: resized, flipped, padded, cut into windows
coco        truth and detections in COCO's form; its average precision
objects     a set through a detector; what stands in the report
label_maps  a set through a segmenter: mIoU and mAcc from one confusion matrix
drawing     predictions drawn on their picture
"""
