"""Operations for inner losses of which torch has no second derivative: attention."""

from diffopt.nn.attention import attention
from diffopt.nn.attention_everywhere import second_order_attention

__all__ = ["attention", "second_order_attention"]
