"""From a pretrained backbone to a classifier.

finetune    one run, from a checkpoint or from random weights
weights     what of a checkpoint fits, new classifiers, rows of old ones
plateau     training until the validation split stops improving
comparison  pretrained against random weights over seeds
"""

from pretrain.finetuning.finetune import finetune
from pretrain.finetuning.plateau import Plateau, has_plateaued, train_to_plateau
from pretrain.finetuning.weights import load_into

__all__ = ["Plateau", "finetune", "has_plateaued", "load_into", "train_to_plateau"]
