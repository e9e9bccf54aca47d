"""The classifier as an ONNX graph of standard operators: deformable convolution becomes gathers of four corners.

Images [batch, channels, S, S] (normalised by the mean and std in the file's metadata) -> logits [batch, classes]; the
batch is free, the size is not. Needs the extra `onnx`.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_pipeline.durable import atomic_path
from data_pipeline.errors import UserError
from dcnv3 import DCNv3
from pretrain.handoff.backbone import METADATA_KEY, Backbone

OPSET = 18
LARGEST_FILE = 2**31 - 2**26  # bytes of weights in one file: protobuf holds 2 GB, the graph among them


def write_onnx(backbone: Backbone, out: Path) -> Path:
    """Write `out` (model.onnx in it, where it is a folder); weights beyond LARGEST_FILE go to OUT.data beside it.

    Raises UserError where the extra is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ImportError as error:
        raise UserError(f"export to onnx needs {error.name!r}: pip install 'internimage-pretrain[onnx]'") from None
    out = out / "model.onnx" if out.is_dir() else out
    model = backbone.build()
    use_reference_operator(model)
    size = backbone.image_size
    # Two images: a batch of one would be taken for a fixed dimension.
    example = torch.zeros(2, model.in_chans, size, size)
    program = torch.onnx.export(
        model,
        (example,),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1)}},
        dynamo=True,
        opset_version=OPSET,
        verbose=False,
    )
    assert program is not None
    proto = program.model_proto
    for key, value in ((METADATA_KEY, json.dumps(backbone.description())), ("input_size", str(size))):
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value
    return save_graph(proto, out)


def save_graph(proto: Any, out: Path) -> Path:
    """Write an onnx.ModelProto to `out`, its weights to OUT.data where they are beyond LARGEST_FILE."""
    import onnx

    with atomic_path(out) as temporary:
        if sum(len(weight.raw_data) for weight in proto.graph.initializer) > LARGEST_FILE:
            weights = out.with_name(out.name + ".data")
            for old in (out, weights):  # onnx appends to a file, and an older graph must not find new weights
                old.unlink(missing_ok=True)
            onnx.save(proto, str(temporary), save_as_external_data=True, location=weights.name)
        else:
            onnx.save(proto, str(temporary))
    return out


def use_reference_operator(model: nn.Module) -> None:
    """Every DCNv3 in plain PyTorch operations, which export knows."""
    for module in model.modules():
        if isinstance(module, DCNv3):
            module.backend = "reference"
