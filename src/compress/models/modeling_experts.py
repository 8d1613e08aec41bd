"""A sparse MLP whose experts are plain linears, one by one.

transformers keeps the experts of a block as two fused parameters and its router as a bare weight. Here they are
linears with names, which can be factorised, stored in few bits and fitted like any other. The function is the stock
block's: each token goes to its `top_k` experts, and what they give is added up by their shares.

This file is carried in every checkpoint of ours, so it stands alone: torch, nothing else.
"""

import torch
from torch import nn

HALF = (torch.float16, torch.bfloat16)
PARTS = ("gate_proj", "up_proj", "down_proj")


class Expert(nn.Module):
    """A gated MLP whose output is multiplied by each token's share before the last linear, which has no bias.

    So what that linear is given says how much its error counts in the stream.
    """

    def __init__(self, gate_proj, up_proj, down_proj, act_fn):
        super().__init__()
        self.gate_proj = gate_proj
        self.up_proj = up_proj
        self.down_proj = down_proj
        self.act_fn = act_fn

    def forward(self, x, shares):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * shares)


class SparseMLP(nn.Module):
    """
    gate: the router. expert: all of them. normalizes: the shares of a token's experts add up to 1.
    shared_expert, shared_expert_gate: an expert of every token and what its share comes from, if the block has one.
    """

    def __init__(self, gate, expert, top_k, normalizes, shared_expert=None, shared_expert_gate=None):
        super().__init__()
        self.gate = gate
        self.expert = nn.ModuleList(expert)
        self.top_k = top_k
        self.normalizes = normalizes
        self.shared_expert = shared_expert
        self.shared_expert_gate = shared_expert_gate

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        update = None
        for number, tokens, shares in self.assignments(x):
            expert = self.shared_expert if number == len(self.expert) else self.expert[number]
            given = expert(x[tokens], shares)
            if update is None:
                update = given.new_zeros(len(x), given.shape[-1])
            update.index_add_(0, tokens, given)
        return update.view(*hidden_states.shape[:-1], update.shape[-1])

    def assignments(self, x):
        """The number of each expert that has some of x (tokens, d), their indices (n,) and its shares of them (n, 1).

        The shared expert comes behind the last one, with all tokens.
        """
        shares, chosen = self.route(x)
        for number in chosen.unique().tolist():
            tokens, place = torch.where(chosen == number)
            yield number, tokens, shares[tokens, place, None]
        if self.shared_expert is not None:
            everyone = torch.arange(len(x), device=x.device)
            yield len(self.expert), everyone, torch.sigmoid(self.shared_expert_gate(x))

    def route(self, x):
        """The shares of the chosen experts and their numbers, (tokens, top_k) each; in float32 where x has less."""
        logits = self.gate(x)
        shares, chosen = torch.softmax(logits.float() if logits.dtype in HALF else logits, dim=-1).topk(self.top_k)
        if self.normalizes:
            shares = shares / shares.sum(-1, keepdim=True)
        return shares.to(x.dtype), chosen


def unfuse_experts(model):
    """Put a SparseMLP with the same weights into the place of every stock sparse MLP, in place; hand the model back."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(getattr(getattr(child, "experts", None), "gate_up_proj", None), nn.Parameter):
                setattr(module, name, unfused(child))
    return model


def unfused(stock):
    fused, act_fn = stock.experts, stock.experts.act_fn
    experts = []
    for gate_up, down in zip(fused.gate_up_proj, fused.down_proj, strict=True):
        gate, up = gate_up.chunk(2)
        experts.append(Expert(linear(gate), linear(up), linear(down), act_fn))
    shared = getattr(stock, "shared_expert", None)
    if shared is not None:
        shared = Expert(*(getattr(shared, part) for part in PARTS), shared.act_fn)
    return SparseMLP(
        linear(stock.gate.weight),
        experts,
        stock.gate.top_k,
        getattr(stock.gate, "norm_topk_prob", True),  # Mixtral's always add up to 1
        shared,
        getattr(stock, "shared_expert_gate", None),
    )


def linear(weight):
    with torch.device("meta"):
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    return made
