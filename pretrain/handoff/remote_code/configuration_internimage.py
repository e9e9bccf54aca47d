"""InternImage's configuration for transformers."""

from transformers import PretrainedConfig


class InternImageConfig(PretrainedConfig):
    """arguments: of InternImage, as internimage_internimage.py defines them."""

    model_type = "internimage"

    def __init__(self, arguments=None, image_size=224, num_channels=3, **options):
        super().__init__(**options)
        self.arguments = arguments or {}
        self.image_size = image_size
        self.num_channels = num_channels
