"""A small causal transformer that foretells the next token, and low-rank adapters for it.

Pre-norm blocks without dropout (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019), learned
positions, an output layer of its own. All first weights come from the generator passed in.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["LORA_RANK", "LoraLinear", "Transformer"]

DIM, LAYERS, HEADS = 64, 2, 4
LORA_RANK = 8
# Hu et al. scale the adapter by alpha / rank.
_LORA_ALPHA = 16.0


class LoraLinear(nn.Module):
    """``y = W x + b + (alpha / r) B A x`` with W and b frozen (Hu et al., "LoRA", ICLR 2022).

    Attributes:
        weight: W, shape ``(out, in)``, frozen.
        bias: b, shape ``(out,)``, frozen.
        down: A, shape ``(r, in)``.
        up: B, shape ``(out, r)``, zero at first, so that the layer begins as its base.
    """

    def __init__(self, base: nn.Linear, generator: torch.Generator, rank: int = LORA_RANK) -> None:
        super().__init__()
        self.weight = nn.Parameter(base.weight.detach(), requires_grad=False)
        self.bias = nn.Parameter(base.bias.detach(), requires_grad=False)
        self.down = nn.Parameter(torch.empty(rank, base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5.0), generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        low = nn.functional.linear(nn.functional.linear(x, self.down), self.up)
        return nn.functional.linear(x, self.weight, self.bias) + (_LORA_ALPHA / self.down.shape[0]) * low


class Block(nn.Module):
    """Attention to earlier positions, then a perceptron; each on a normed input and added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(DIM, device="meta")
        self.qkv: nn.Module = nn.Linear(DIM, 3 * DIM, device="meta")
        self.mixed: nn.Module = nn.Linear(DIM, DIM, device="meta")
        self.perceptron_norm = nn.LayerNorm(DIM, device="meta")
        self.wide: nn.Module = nn.Linear(DIM, 4 * DIM, device="meta")
        self.narrow: nn.Module = nn.Linear(4 * DIM, DIM, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, t, DIM)`` to the same shape."""
        n, t, _ = x.shape
        heads = self.qkv(self.attention_norm(x)).view(n, t, 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        x = x + self.mixed(attended.transpose(1, 2).reshape(n, t, DIM))
        hidden = nn.functional.gelu(self.wide(self.perceptron_norm(x)))
        return x + self.narrow(hidden)  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Logits of the token that follows each position, from the tokens up to it.

    Args:
        vocabulary: number of tokens, at least 2.
        context: T, longest input.
        generator: decides the first weights.
        lora: freeze the linear layers inside the blocks and learn low-rank adapters for them instead; embeddings,
            positions, norms and the output layer are learnt in full either way.
    """

    def __init__(self, vocabulary: int, context: int, generator: torch.Generator, *, lora: bool = False) -> None:
        super().__init__()
        # Layers draw their first weights from global state; on the meta device they cannot.
        self.token = nn.Embedding(vocabulary, DIM, device="meta")
        self.position = nn.Embedding(context, DIM, device="meta")
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(DIM, device="meta")
        self.head = nn.Linear(DIM, vocabulary, device="meta")
        self.to_empty(device="cpu")
        self._draw(generator)
        if lora:
            for block in self.blocks:
                for name in ("qkv", "mixed", "wide", "narrow"):
                    setattr(block, name, LoraLinear(getattr(block, name), generator))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map token numbers ``(n, t)``, t up to T, to logits ``(n, t, vocabulary)``."""
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]

    def _draw(self, generator: torch.Generator) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding | nn.Linear):
                # What is added to the residual path is smaller the more often it is added (Radford et al. 2019).
                deep = name.endswith(("mixed", "narrow"))
                inputs = DIM if isinstance(module, nn.Embedding) else module.in_features
                deviation = 1.0 / math.sqrt(inputs * (2 * LAYERS if deep else 1))
                nn.init.normal_(module.weight, 0.0, deviation, generator=generator)
                if isinstance(module, nn.Linear):
                    nn.init.zeros_(module.bias)
