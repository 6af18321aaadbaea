"""The encoder of the Long Range Arena as a Transformers model: learned positions, attention by `attn_implementation`, one or two towers,
a small head.

import recipes.lra.model
AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="linattn")
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

POOLINGS = ("mean", "mean_padded", "cls")
NORMS = ("pre", "post")


class LRAConfig(PreTrainedConfig):
    """Sizes of the encoder. The defaults are the small configuration of the Nystromformer and Skyformer papers.

    Args:
        max_position_embeddings: the most tokens of a sequence, the CLS token not counted.
        pooling: "mean" over the tokens that are no padding; "mean_padded", their sum over max_position_embeddings, as the published small
            configuration has it; "cls", the state of a learned token put in front.
        norm: "pre", LayerNorm before attention and feed-forward and after the last layer; "post", after each sum.
        attention_size: the width of queries, keys and values, all heads together; None: hidden_size.
        towers: 2 encodes a pair by the same encoder and classifies [a, b, a * b, a - b].
        pad_token_id: 0; the data's tokens begin at 1.

    Raises:
        ValueError: an unknown pooling or norm, a number of towers other than 1 and 2, or a width that the heads do not divide.
    """

    model_type = "lra_encoder"

    def __init__(
        self,
        vocab_size: int = 257,
        hidden_size: int = 64,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 2,
        intermediate_size: int = 128,
        max_position_embeddings: int = 1024,
        hidden_act: str = "gelu",
        hidden_dropout: float = 0.1,
        attention_dropout: float = 0.0,
        layer_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        pooling: str = "mean",
        norm: str = "pre",
        attention_size: int | None = None,
        towers: int = 1,
        pad_token_id: int | None = 0,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.hidden_act = hidden_act
        self.hidden_dropout = hidden_dropout
        self.attention_dropout = attention_dropout
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        self.pooling = pooling
        self.norm = norm
        self.attention_size = attention_size or hidden_size
        self.towers = towers
        for name, value, allowed in (("pooling", pooling, POOLINGS), ("norm", norm, NORMS), ("towers", towers, (1, 2))):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, allowed))}")
        if self.attention_size % num_attention_heads:
            raise ValueError(f"the attention's width {self.attention_size} is not a multiple of num_attention_heads {num_attention_heads}")
        self.pad_token_id = pad_token_id
        super().__init__(**kwargs)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Softmax attention written out. query, key, value (B, H, N, D), attention_mask additive; returns (B, N, H, D) and the weights."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class LRAAttention(nn.Module):
    is_causal = False

    def __init__(self, config: LRAConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.attention_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.query = nn.Linear(config.hidden_size, config.attention_size)
        self.key = nn.Linear(config.hidden_size, config.attention_size)
        self.value = nn.Linear(config.hidden_size, config.attention_size)
        self.out = nn.Linear(config.attention_size, config.hidden_size)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        shape = (*hidden.shape[:-1], -1, self.head_dim)
        query, key, value = (project(hidden).view(shape).transpose(1, 2) for project in (self.query, self.key, self.value))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        mixed, _ = attend(self, query, key, value, mask, scaling=self.scaling, dropout=dropout)  # (B, N, H, D)
        return self.out(mixed.flatten(2))


class LRALayer(nn.Module):
    def __init__(self, config: LRAConfig, layer_idx: int) -> None:
        super().__init__()
        self.pre = config.norm == "pre"
        self.attention_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = LRAAttention(config, layer_idx)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.feed_forward = nn.Sequential(
            nn.Linear(config.hidden_size, config.intermediate_size),
            ACT2FN[config.hidden_act],
            nn.Dropout(config.hidden_dropout),
            nn.Linear(config.intermediate_size, config.hidden_size),
        )
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        if self.pre:
            hidden = hidden + self.dropout(self.attention(self.attention_norm(hidden), mask))
            return hidden + self.dropout(self.feed_forward(self.feed_forward_norm(hidden)))
        hidden = self.attention_norm(hidden + self.dropout(self.attention(hidden, mask)))
        return self.feed_forward_norm(hidden + self.dropout(self.feed_forward(hidden)))


class LRAPreTrainedModel(PreTrainedModel):
    config_class = LRAConfig
    base_model_prefix = "encoder"
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["LRALayer"]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            # PyTorch's own, which the published small configuration keeps: a width of 64 learns slowly from 0.02
            init.kaiming_uniform_(module.weight, a=5**0.5)
            init.uniform_(module.bias, -(module.in_features**-0.5), module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, LRAModel) and module.cls is not None:
            init.normal_(module.cls, std=self.config.initializer_range)


class LRAModel(LRAPreTrainedModel):
    """Tokens to states: input_ids (B, N) integer, attention_mask (B, N), 0 at padding, to (B, N, hidden_size) and the pooled (B,
    hidden_size).

    Raises ValueError where N is above max_position_embeddings."""

    def __init__(self, config: LRAConfig) -> None:
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        extra = int(config.pooling == "cls")
        self.positions = nn.Embedding(config.max_position_embeddings + extra, config.hidden_size)
        self.cls = nn.Parameter(torch.empty(1, 1, config.hidden_size)) if extra else None
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList([LRALayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps) if config.norm == "pre" else nn.Identity()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.tokens = value  # type: ignore[assignment]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> BaseModelOutputWithPooling:
        if input_ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"{input_ids.shape[1]} tokens are given and the model has {self.config.max_position_embeddings} positions; shorten them."
            )
        hidden = self.tokens(input_ids)
        if self.cls is not None:
            hidden = torch.cat([self.cls.expand(len(hidden), 1, -1), hidden], 1)
            if attention_mask is not None:
                attention_mask = nn.functional.pad(attention_mask, (1, 0), value=1)
        hidden = self.dropout(hidden + self.positions.weight[: hidden.shape[1]])
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=hidden, attention_mask=attention_mask)
        for layer in self.layers:
            hidden = layer(hidden, mask)
        hidden = self.norm(hidden)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=self.pool(hidden, attention_mask))

    def pool(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(B, hidden_size) of states (B, N, hidden_size); sums are float32."""
        if self.config.pooling == "cls":
            return hidden[:, 0]
        total: Tensor | int = hidden.shape[1]
        if attention_mask is not None:
            hidden = torch.where(attention_mask[:, :, None].bool(), hidden, 0)
            total = attention_mask.sum(1, keepdim=True).clamp(min=1)
        if self.config.pooling == "mean_padded":
            total = self.config.max_position_embeddings
        return (hidden.sum(1, dtype=torch.float32) / total).to(hidden.dtype)


class LRAForSequenceClassification(LRAPreTrainedModel):
    """Classes of a sequence, or of a pair where config.towers is 2 (the second as pair_ids and pair_mask).

    Returns a SequenceClassifierOutput: logits (B, num_labels), float32, and the mean cross-entropy where labels (B,) are given.
    Raises ValueError where pair_ids are missing or superfluous."""

    def __init__(self, config: LRAConfig) -> None:
        super().__init__(config)
        self.encoder = LRAModel(config)
        width = config.hidden_size * (4 if config.towers == 2 else 1)
        self.classifier = nn.Sequential(
            nn.Linear(width, config.intermediate_size), nn.ReLU(), nn.Linear(config.intermediate_size, int(config.num_labels or 0))
        )
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pair_ids: Tensor | None = None,
        pair_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        if (pair_ids is not None) != (self.config.towers == 2):
            raise ValueError(f"the model has {self.config.towers} tower(s): give pair_ids to a model of two towers, and to no other.")
        pooled = self.encoder(input_ids, attention_mask).pooler_output
        if pair_ids is not None:
            other = self.encoder(pair_ids, pair_mask).pooler_output
            pooled = torch.cat([pooled, other, pooled * other, pooled - other], -1)
        logits = self.classifier(pooled).float()
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)  # type: ignore[arg-type]


AutoConfig.register(LRAConfig.model_type, LRAConfig, exist_ok=True)
AutoModel.register(LRAConfig, LRAModel, exist_ok=True)
AutoModelForSequenceClassification.register(LRAConfig, LRAForSequenceClassification, exist_ok=True)
