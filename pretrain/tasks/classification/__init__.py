"""Classification: the image model with its own classifier, trained on labels (from scratch, or fine-tuning).

task.py    the section of the configuration, its reader and its evaluation
module.py  the module: batch in, loss out
"""
