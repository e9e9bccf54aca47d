"""How good a checkpoint is, each score beside chance.

metrics         pure functions: recall with fair ties, top-k, intervals
encoding        a set or texts through the model
retrieval       image-text retrieval, both ways
classification  top-1 of a classifier, and zero-shot by class names
probe, knn      what frozen features tell, with and without a fit
pictures        folders of pictures that are no shard set
sharing         ranks that share the work
results         the JSON that an evaluation writes and the report reads
subject         a run, an export or a foreign file, ready to be scored
embedding       a vector for every sample of a set
evaluate        one of these and a set in, all results out
predict         a checkpoint and pictures in, drawings and COCO's results out
dense/          boxes, masks and label maps
"""

from pretrain.evaluation.classification import top1, zero_shot
from pretrain.evaluation.embedding import embed
from pretrain.evaluation.evaluate import evaluate
from pretrain.evaluation.loading import load_module, untrained_like
from pretrain.evaluation.probe import linear_probe
from pretrain.evaluation.results import put_beside, read_results, summary, value_of, write_result
from pretrain.evaluation.retrieval import retrieval
from pretrain.training.sharing import shared_by, shared_by_ranks

__all__ = [
    "embed",
    "evaluate",
    "linear_probe",
    "load_module",
    "put_beside",
    "read_results",
    "retrieval",
    "shared_by",
    "shared_by_ranks",
    "summary",
    "top1",
    "untrained_like",
    "value_of",
    "write_result",
    "zero_shot",
]
