"""Figures of what a model has learnt: a PNG and its numbers as JSON, in RUN/figures, from where the report takes them.

receptive_field   how far a pixel of each stage looks          sampling   where the deformable kernels take their points
features          patches by the main directions of features   pictures   what they are drawn on, and how they are kept
"""
