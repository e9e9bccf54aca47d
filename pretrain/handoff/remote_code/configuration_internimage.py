"""InternImage's configuration for transformers."""

from transformers import PretrainedConfig

try:
    from transformers.backbone_utils import BackboneConfigMixin
except ImportError:  # transformers before 5, where the folder has no AutoBackbone

    class BackboneConfigMixin:  # type: ignore[no-redef]
        def set_output_features_output_indices(self, out_features, out_indices):
            pass


class InternImageConfig(BackboneConfigMixin, PretrainedConfig):
    """arguments: of InternImage, as internimage_internimage.py defines them; its classifier has `num_labels` rows.

    image_mean, image_std: what images are normalised by. text: sizes of the text tower, None where there is none.
    sigmoid: whether it was trained with the sigmoid loss, whose logits have a bias.
    origin: which training the weights are of. out_features or out_indices: stages whose maps AutoBackbone gives, by
    default the last; the other classes read neither.
    """

    model_type = "internimage"

    def __init__(
        self,
        arguments=None,
        image_size=224,
        num_channels=3,
        image_mean=(0.485, 0.456, 0.406),
        image_std=(0.229, 0.224, 0.225),
        text=None,
        sigmoid=False,
        origin=None,
        out_features=None,
        out_indices=None,
        **options,
    ):
        arguments = arguments or {}
        if "num_classes" in arguments and not {"id2label", "num_labels"} & set(options):
            options["num_labels"] = arguments["num_classes"]
        super().__init__(**options)
        self.arguments = arguments
        self.image_size = image_size
        self.num_channels = num_channels
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.text, self.sigmoid = text, sigmoid
        self.origin = origin or {}
        self.stage_names = ["stage1", "stage2", "stage3", "stage4"]
        self.set_output_features_output_indices(out_features, out_indices)
