"""Small GPT-2, Llama and BERT of ``transformers``, fine-tuned by a loop in plain torch; float64."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

transformers: Any = pytest.importorskip("transformers", reason="needs `pip install torch-diffopt[transformers]`")

EXAMPLES, LENGTH, WORDS, STEPS = 4, 6, 11, 4
BETAS, DECAY, NORM = (0.9, 0.99), 0.01, 1.0
EPS = 1e-4
"""The gradient of a bias of keys is zero but for rounding, which Adam divides by this."""
DOMAIN = torch.tensor([0, 1, 1, 0])

BLOCKS = {"gpt2": "transformer.h", "llama": "model.layers", "bert": "bert.encoder.layer"}
ADAPTED = {"gpt2": "transformer.h.0.attn.c_attn", "llama": "model.layers.1.self_attn.q_proj", "bert": "classifier"}

Context = Callable[[], AbstractContextManager[Any]]


class RMSNorm(nn.Module):
    """Llama's norm in the precision of its input; the one of ``transformers`` computes in float32."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class LoRA(nn.Module):
    """Adds a product of two thin matrices to a weight, as a parametrization: ``W + up @ down``."""

    def __init__(self, weight: Tensor, rank: int = 2) -> None:
        super().__init__()
        self.down = nn.Parameter(0.1 * torch.randn(rank, weight.shape[1], dtype=weight.dtype))
        self.up = nn.Parameter(0.1 * torch.randn(weight.shape[0], rank, dtype=weight.dtype))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def model(kind: str, *, dropout: float = 0.0, attention_dropout: float = 0.0, lora: bool = False) -> nn.Module:
    """With random weights; ``lora``: all is frozen but one adapted weight's factors."""
    torch.manual_seed(0)
    one = {"vocab_size": WORDS, "attn_implementation": "sdpa", "bos_token_id": 1, "eos_token_id": 2}
    if kind == "gpt2":
        config: Any = transformers.GPT2Config(n_layer=2, n_embd=8, n_head=2, n_positions=LENGTH, use_cache=False, **one)
        config.resid_pdrop = config.embd_pdrop = dropout
        config.attn_pdrop = attention_dropout
        made: Any = transformers.GPT2LMHeadModel(config)
    else:
        sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
        if kind == "llama":  # two queries share a key; the words' vectors are those of the head as well
            more = {"num_key_value_heads": 1, "tie_word_embeddings": True, "use_cache": False}
            config = transformers.LlamaConfig(attention_dropout=attention_dropout, **sizes, **more, **one)
            made = transformers.LlamaForCausalLM(config)
        else:
            config = transformers.BertConfig(max_position_embeddings=LENGTH, num_labels=3, **sizes, **one)
            config.hidden_dropout_prob, config.attention_probs_dropout_prob = dropout, attention_dropout
            made = transformers.BertForSequenceClassification(config)
    made = made.double().train()
    for name, norm in list(made.named_modules()):
        if type(norm).__name__ == "LlamaRMSNorm":
            made.set_submodule(name, RMSNorm(norm))
    for parameter in made.parameters():  # nothing is to vanish
        parameter.data += 0.1 * torch.randn_like(parameter)
    if lora:
        made.requires_grad_(False)
        part = made.get_submodule(ADAPTED[kind])
        nn.utils.parametrize.register_parametrization(part, "weight", LoRA(part.weight))
    return made


def batch(kind: str, seed: int = 0) -> dict[str, Tensor]:
    """Words, of which every one occurs, and a mask: some examples are shorter."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.arange(EXAMPLES * LENGTH) % WORDS
    words = words[torch.randperm(len(words), generator=generator)].view(EXAMPLES, LENGTH)
    mask = torch.ones_like(words)
    mask[1, -2:] = 0
    found = {"input_ids": words, "attention_mask": mask}
    if kind == "bert":
        found["token_type_ids"] = torch.arange(LENGTH).expand(EXAMPLES, -1) % 2
    return found


def losses(kind: str, logits: Tensor, data: dict[str, Tensor]) -> Tensor:
    """One for each example."""
    if kind == "bert":
        return F.cross_entropy(logits, torch.tensor([0, 1, 2, 1]), reduction="none")
    seen = data["attention_mask"][:, 1:].double()
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), data["input_ids"][:, 1:], reduction="none")
    return (each * seen).sum(1) / seen.sum(1)


def inner_loss(kind: str, call: Callable[..., Any], params: Any, meta: dict[str, Tensor], context: Context) -> Tensor:
    """Of the weighted examples, in a learned mixture of two domains."""
    data = batch(kind)
    with context():
        logits = call(params, **data).logits
    share = 2 * meta["mixture"].softmax(0)[DOMAIN]
    return (meta["weights"] * share * losses(kind, logits, data)).mean()


def metas() -> dict[str, Tensor]:
    """Weights of examples, logits of the mixture, a learning rate of each step, with warm-up."""
    values = {"weights": [1.0, 0.5, 1.5, 0.8], "mixture": [0.2, -0.3], "rates": [0.003, 0.006, 0.01, 0.01]}
    return {name: torch.tensor(x, dtype=torch.float64, requires_grad=True) for name, x in values.items()}


def root(x: Tensor) -> Tensor:
    """The square root, with the derivative zero at zero: a bias of keys has no gradient at all."""
    return torch.where(x > 0, x, 1).sqrt() * (x > 0)


def by_hand(kind: str, module: nn.Module, params: dict[str, Tensor], meta: dict[str, Tensor], context: Context) -> Any:
    """Four steps of AdamW on clipped gradients, unrolled."""

    def call(params: dict[str, Tensor], **data: Tensor) -> Any:
        return torch.func.functional_call(module, params, (), data)

    first = {k: torch.zeros_like(p) for k, p in params.items()}
    second = dict(first)
    for step in range(1, STEPS + 1):
        loss = inner_loss(kind, call, params, meta, context)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        norm = sum(g.square().sum() for g in grads).sqrt()
        cut = torch.clamp(NORM / (norm + 1e-6), max=1)
        lr, (a, b) = meta["rates"][step - 1], BETAS
        for (k, p), g in zip(list(params.items()), grads, strict=True):
            first[k] = a * first[k] + (1 - a) * cut * g
            second[k] = b * second[k] + (1 - b) * (cut * g).square()
            scale = root(second[k] / (1 - b**step)) + EPS
            params = {**params, k: p * (1 - lr * DECAY) - lr * (first[k] / (1 - a**step)) / scale}
    return params
