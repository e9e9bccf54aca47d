"""Targets of dense tasks: they move with the pixels.

objects     COCO's boxes and masks -> ObjectTargets        label_maps  one class a pixel -> LabelMapTargets
pictures    whole pictures of a set with their annotations, for scores
"""

from data_pipeline.reading.dense.label_maps import IGNORED, LabelMaps, LabelMapTargets
from data_pipeline.reading.dense.objects import Annotation, Objects, ObjectTargets, parse_annotation
from data_pipeline.reading.dense.pictures import WholePicture, whole_pictures

__all__ = [
    "IGNORED", "Annotation", "LabelMapTargets", "LabelMaps", "ObjectTargets", "Objects", "WholePicture",
    "parse_annotation", "whole_pictures",
]  # fmt: skip
