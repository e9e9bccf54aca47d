"""`internimage study m3i`: which part of the objective brings what, by training arms side by side.

arms       what is compared, as changes of one configuration     training   steps from equal time; runs, resumable
features   scores of a frozen encoder, picture by picture        comparison paired bootstrap, table, plot
study      plan -> train -> score -> compare
"""

from pretrain.studies.study import study

__all__ = ["study"]
