"""ONNX graphs of standard operators: deformable convolution becomes gathers of four corners. Needs the extra `onnx`.

model.onnx   images [B, C, H, W] -> logits [B, classes], or without a classifier `features`, the vector it would read;
             with a text tower also vectors [B, embed_dim]
text.onnx    tokens int64 [B, context] -> vectors         their cosines are the similarity, times exp(log_scale) of the
                                                          metadata
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.durable import atomic_path
from data_pipeline.errors import UserError
from pretrain.handoff.backbone import Backbone
from pretrain.handoff.text import write_tokenizer
from pretrain.handoff.traced import example, free_images, use_reference_operator
from pretrain.models import InternImage
from pretrain.models.reading import METADATA_KEY

LARGEST_FILE = 2**31 - 2**26  # bytes of weights in one file: protobuf holds 2 GB, the graph among them


class ImageTower(nn.Module):
    """Normalised images [B, C, H, W] -> the model's own output, and the pooled vectors that meet the text, [B,
    embed_dim], not normalised: both of one pass.
    """

    def __init__(self, image: InternImage) -> None:
        super().__init__()
        self.image = image

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        vectors = self.image.clip_projector(self.image.forward_fused(x).flatten(1, 2))
        return self.image.head(self.image.fc_norm(vectors)), vectors


def write_onnx(backbone: Backbone, out: Path, *, opset: int = 20, free_size: bool = False) -> Path:
    """Write `out`, a graph; or where it names a folder (no .onnx at its end) model.onnx in it, with text.onnx and its
    tokenizer where there is a text tower. The batch is free. Weights beyond LARGEST_FILE go to OUT.data beside it.

    free_size: both sides may be any multiple of 32 pixels from 64 on; the export then takes minutes, and the graph
    computes its sampling grids at each call.

    Raises UserError where the extra is not installed, or for an opset that the exporter does not know.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ImportError as error:
        raise UserError(f"export to onnx needs {error.name!r}: pip install 'internimage-pretrain[onnx]'") from None
    model, text = backbone.build(), backbone.text
    use_reference_operator(model)
    free, described = free_images(), json.dumps(backbone.description())
    shapes = {"x": free if free_size else {0: free[0]}}
    outputs = ["logits" if model.num_classes else "features"]
    folder = None if out.suffix == ".onnx" else out
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        out = folder / "model.onnx"
    if text is None:
        save_graph(_graph(model, example(backbone), shapes, "images", outputs, described, opset), out)
        return folder or out
    outputs.append("vectors")
    save_graph(_graph(ImageTower(model), example(backbone), shapes, "images", outputs, described, opset), out)
    if folder is not None:
        tokens = torch.zeros(2, text.sizes["context_length"], dtype=torch.int64)
        free_texts = {"tokens": {0: torch.export.Dim("batch", min=1)}}
        graph = _graph(text.build(), tokens, free_texts, "tokens", ["vectors"], described, opset)
        save_graph(graph, folder / "text.onnx")
        write_tokenizer(text, folder)
    return folder or out


def _graph(
    model: nn.Module,
    example: Tensor,
    shapes: dict[str, Any],
    given: str,
    outputs: list[str],
    described: str,
    opset: int,
) -> Any:
    """An onnx.ModelProto. given, outputs: names of its input and its outputs."""
    try:
        program = torch.onnx.export(
            model.eval(),
            (example,),
            input_names=[given],
            output_names=outputs,
            dynamic_shapes=shapes,
            dynamo=True,
            opset_version=opset,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        raise UserError(f"export to onnx, opset {opset}: {str(error).splitlines()[0]}") from error
    assert program is not None
    proto = program.model_proto
    entry = proto.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, described
    return proto


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
