"""Any objective over the language-model head without the logits of all rows at once."""

from stillhouse.fused.api import fused_label_facts, fused_loss, fused_rows
from stillhouse.fused.config import FusedConfig

__all__ = ["FusedConfig", "fused_label_facts", "fused_loss", "fused_rows"]
