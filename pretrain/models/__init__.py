"""InternImage on dcnv3: every published variant, the released weights both ways, at home in timm."""

from pretrain.models import official, timm_registration
from pretrain.models.internimage import InternImage
from pretrain.models.registry import create_model
from pretrain.models.variants import VARIANTS, Variant

__all__ = ["VARIANTS", "InternImage", "Variant", "create_model", "official", "timm_registration"]
