"""Image-text pretraining: the M3I-style objective, and the methods that are special cases of it.

task.py     the section of the configuration, its reader and its evaluations
recipes.py  which losses a preset switches on
build.py    from a configuration to a module
module.py   the module: batch in, loss out
teacher.py  the momentum teacher of the dense and pooled targets
"""
