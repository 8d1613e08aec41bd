"""Predict what rounding each matrix of a model to each type costs the loss, before any is rounded.

To second order an error E of a linear's weight costs half the mean of (g . E x)^2 nats a token, g the loss's gradient
by its outputs. With errors of different weights uncorrelated, and what a sweep (GPTQ) makes up for taken off,

    1/2 sum_r G_r sum_j D_j E_rj^2        G_r = E g_r^2,  D_j = 1 / U_jj^2,  U^T U = H^-1,  H = E x x^T

D is the part of each input that those swept after it cannot make up for. That errors of all linears add up is the
linearity theorem of HIGGS (arXiv 2411.17525). E is of a fit of the type's scales to some rows: of the embeddings' table
those of tokens of the text, of the head those of the likeliest next ones. Types are llama.cpp's, or integers in groups.

`RoundedModel` measures what types together cost: the dense model on a few windows, its matrices rounded. Nothing is
swept; errors are made as small as a sweep will leave them, for to first order only their size counts. A part is in
memory at a time. The streams between the blocks of the best types so far are kept: a trial begins where its types
differ from these.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Float64, Int64
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compress.calibration.observers import LinearFilter, LinearObserver
from compress.calibration.processes import Processes
from compress.calibration.statistics import rows
from compress.calibration.streams import ActivationCache, Batch, CacheFolder, Streams, mean_divergence
from compress.calibration.weights import PartLoader
from compress.numerics.block_grid import TRIALS, BlockGrid, fit_blocks
from compress.numerics.block_types import TYPES
from compress.numerics.decomposition import DAMPING
from compress.numerics.grids import Grid, QuantizationArgs
from compress.numerics.moments import InputMoments
from compress.numerics.steps import make_grid
from compress.numerics.sums import DiagonalSum

ROWS = 64  # of a linear, and
TABLE_ROWS = 1024  # of a table, that errors are taken of
TOKENS = 256  # before the head
Candidates = Callable[[int], Sequence[str]]  # the types for rows of so many weights


class RoundingObserver(LinearObserver):
    """Watch linears for their costs by type, in the order of `candidates`.

    stored: the dtype of integers' scales.
    found: `cost PATH`, by type; `variance PATH`, of the inputs; `left PATH`, the share of an error that a sweep leaves,
    as a factor of the weights' error.
    """

    def __init__(self, *arguments: Any, candidates: Candidates, stored: torch.dtype, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.candidates, self.stored = candidates, stored
        self.found: dict[str, Tensor] = {}
        self.states: list[Tensor] = []

    def _gradient_sum(self, path: str, m: int) -> DiagonalSum:
        return self.gradients.setdefault(path, DiagonalSum(m, self.device))  # type: ignore[return-value]

    def measure(
        self, path: str, module: nn.Linear, moments: InputMoments, gradients: Mapping[str, Tensor], watch: LinearFilter
    ) -> None:
        if not (types := self.candidates(module.in_features)) or path not in gradients:
            return
        centered = watch.centers(has_bias=module.bias is not None)
        hessian = moments.spread(centered=centered).hessian(DAMPING, name=path)
        variance = hessian.damped.diagonal().clone()
        pivots = torch.empty_like(variance)
        pivots[hessian.order] = hessian.ordered_inverse_root.diagonal().square().reciprocal()
        W, G = module.weight.detach(), gradients[path].double()
        some = evenly(len(W), ROWS, W.device)
        scale = G.sum() / G[some].sum().clamp_min(1e-300)
        errors = [G[some] @ self._error(W[some], name, variance) for name in types]
        costs = torch.stack([(each * pivots).sum() for each in errors]) * scale / 2
        left = (costs.sum() / ((torch.stack(errors) * variance).sum() * scale / 2).clamp_min(1e-300)).sqrt()
        self.note(path, costs, left.clamp_max(1.0), variance.float())

    def note(self, path: str, costs: Tensor, left: Tensor, variance: Tensor | None = None) -> None:
        named = {"cost": costs, "left": left.view(1)} | ({} if variance is None else {"variance": variance})
        self.processes.follow(*named.values())
        self.found |= {f"{kind} {path}": tensor for kind, tensor in named.items()}

    def last(self, x: Float[Tensor, "windows tokens D"]) -> None:
        """Keep some of the states before the head."""
        if (room := TOKENS - sum(map(len, self.states))) > 0:
            self.states.append(rows(x)[evenly(rows(x).shape[0], room, x.device)].detach().clone())

    @torch.no_grad()
    def tables(self, loader: PartLoader, batches: Sequence[Batch], gradients: ActivationCache) -> None:
        """Find the costs of the embeddings' table and of the head. gradients: by the embeddings' outputs."""
        decoder, family = loader.decoder, loader.decoder.family
        table, head, costs = family.embeddings[0], family.head, dict[str, Tensor]()
        with loader.embeddings():
            W = decoder.model.get_submodule(table).get_parameter("weight")
            costs[table] = self._of_embeddings(W, batches, gradients, decoder.embed)
        with loader.head():
            norm = decoder.head_branch().norm
            states = torch.cat(self.states) if norm is None else norm(torch.cat(self.states))
            W = decoder.model.get_submodule(head).get_parameter("weight")
            costs[head] = self._of_head(W, states, decoder.logits_of)
        if decoder.config.tie_word_embeddings:
            costs[table] = costs[table] + costs.pop(head)
        for path, each in costs.items():
            self.processes.add_up(each)
            if len(each):
                self.note(path, each / self.processes.count, torch.ones((), dtype=each.dtype, device=each.device))

    def _of_embeddings(
        self, W: Tensor, batches: Sequence[Batch], gradients: ActivationCache, embed: Callable[..., Any]
    ) -> Float64[Tensor, "types"]:
        total = sum(gradients.get(batch.index, W.device).double().square().sum((0, 1)) for batch in batches)
        G = total / sum(batch.ids.numel() for batch in batches)
        ids = torch.cat([batch.ids.flatten() for batch in batches]).to(W.device)
        ids = ids[evenly(len(ids), TABLE_ROWS, W.device)]
        stream = embed(ids[:TOKENS][None])[0]
        scale = float(stream.norm() / W[ids[:TOKENS]].norm()) ** 2  # some models multiply what they embed
        costs = [(self._error(W[ids], name) @ G).mean() * scale / 2 for name in self.candidates(W.shape[1])]
        return torch.stack(costs) if costs else W.new_zeros(0, dtype=torch.float64)

    def _of_head(
        self, W: Tensor, states: Float[Tensor, "tokens d"], logits_of: Callable[[Tensor], Tensor]
    ) -> Float64[Tensor, "types"]:
        """1/2 E sum_v p_v (1 - p_v) (E_v . x)^2: the divergence, with errors of rows uncorrelated."""
        p = logits_of(states @ W.T).softmax(-1)
        felt = p * (1 - p)
        mass = felt.sum(0)
        likely = mass.topk(min(TABLE_ROWS, len(mass))).indices
        scale = float(mass.sum() / mass[likely].sum()) / len(states) / 2
        costs = []
        for name in self.candidates(W.shape[1]):
            E = fitted(W[likely], name, stored=self.stored).dequantized(W[likely]) - W[likely]
            costs.append((felt[:, likely] * (states @ E.T).square()).double().sum() * scale)
        return torch.stack(costs) if costs else W.new_zeros(0, dtype=torch.float64)

    def _error(self, W: Float[Tensor, "m n"], name: str, variance: Tensor | None = None) -> Float64[Tensor, "m n"]:
        """Squared errors of the nearest values in a type."""
        found = fitted(W, name, variance, stored=self.stored).dequantized(W)
        return (found.double() - W.double()).square()


def fitted(
    W: Float[Tensor, "m n"], name: str, variance: Tensor | None = None, *, stored: torch.dtype, trials: int = TRIALS
) -> Grid:
    """The grid of a type for W, as a sweep begins with it.

    variance: of the inputs. stored: the dtype of integers' scales. trials: of blocks', for each end of the grid.
    """
    if name in TYPES:
        return fit_blocks(W, TYPES[name], variance, trials=trials)
    return make_grid(W, QuantizationArgs.of_name(name), method="mse", stored=stored)


def evenly(total: int, count: int, device: torch.device) -> Int64[Tensor, "_"]:
    """`count` numbers below `total`, evenly spread; all where there are no more."""
    count = min(count, total)
    return torch.arange(count, device=device) * total // max(count, 1)


FEW = 3  # scales that are tried for each end of a grid
AT_ONCE = 2**22  # weights
# The parts of a grid, in the precision that blocks have.
GRID_PARTS = {"d": torch.float16, "low": torch.float16, "sc": torch.int8, "mn": torch.int8}
Types = Mapping[str, str]


class RoundedModel:
    """The dense model with rounded matrices, for the divergence of each set of types.

    roundings: as `RoundingObserver` finds them. stored: the dtype of integers' scales. memory: bytes of activations to
        hold in memory.
    types, inputs: the best so far, and what each block and the head are given by them. tried: the same of the last
        trial.
    """

    def __init__(
        self,
        loader: PartLoader,
        batches: list[Batch],
        caches: CacheFolder,
        roundings: Mapping[str, Tensor],
        *,
        stored: torch.dtype,
        memory: int,
        processes: Processes,
    ) -> None:
        self.loader, self.decoder, self.roundings, self.stored = loader, loader.decoder, roundings, stored
        self.caches, self.scratch = caches, caches.scratch
        self.copies = 2 * len(self.decoder.blocks) + 4
        self.memory = memory // self.copies
        self.streams = Streams(self.decoder, batches, caches, dense=True, memory=2 * self.memory, processes=processes)
        self.types: Types = {}
        self.inputs: list[ActivationCache] = []
        with torch.no_grad():
            self.tried: tuple[Types, list[ActivationCache]] = {}, self._passed({}, [])
        self.keep()
        self.streams.dense = self.inputs[-1]

    def keep(self) -> None:
        self.types, self.inputs = self.tried

    @torch.no_grad()
    def divergence(self, types: Types) -> float:
        """The mean divergence of the next token from the dense model's, in nats, with matrices of these types."""
        inputs = self._passed(types, self.inputs[: self._same(types)])
        self.tried = types, inputs
        for batch in self.streams.batches:
            self.streams.compressed.put(batch.index, inputs[-1].stored(batch.index))
        decoder, family = self.decoder, self.decoder.family
        with self.loader.head():
            head = decoder.head_branch()
            (reader,) = head.readers.values()
            weight, bias = reader.weight, reader.bias
            path = family.embeddings[0] if decoder.config.tie_word_embeddings else family.head
            if path in types:
                decoder.fill({f"{family.head}.weight": self._rounded(path, types[path], weight)})
            found = mean_divergence(head, weight, bias, self.streams)
        assert found is not None
        return found

    def _same(self, types: Types) -> int:
        """How many of the inputs are as they were with the best types."""
        changed = {path for path in types.keys() | self.types.keys() if types.get(path) != self.types.get(path)}
        if changed & {*self.decoder.family.embeddings}:
            return 0
        blocks = range(len(self.decoder.blocks))
        prefixes = (self.decoder.block_prefix(block) for block in blocks)
        first = (place for place, prefix in enumerate(prefixes) if any(path.startswith(prefix) for path in changed))
        return 1 + next(first, len(blocks))

    def _passed(self, types: Types, inputs: list[ActivationCache]) -> list[ActivationCache]:
        """The inputs of all blocks and the head, of which the first are there."""
        decoder, batches = self.decoder, self.streams.batches
        if not inputs:
            with self.loader.embeddings():
                self._round(types, decoder.family.embeddings[:1])
                inputs = [self._new_cache()]
                for batch, x in zip(batches, self.streams.record_arguments(), strict=True):
                    inputs[0].put(batch.index, x)
        for block in range(len(inputs) - 1, len(decoder.blocks)):
            after = self._new_cache()
            with self.loader.block(block):
                prefix = decoder.block_prefix(block)
                self._round(types, [path for path in types if path.startswith(prefix)])
                branches = decoder.block_branches(block)
                for batch in batches:
                    x = inputs[-1].get(batch.index, decoder.device)
                    for branch in branches:
                        x = x + self.streams.update(branch, x, batch, block)
                    after.put(batch.index, x)
            inputs = [*inputs, after]
        return inputs

    def _new_cache(self) -> ActivationCache:
        return self.caches.new("trial", self.streams.batches, self.memory, copies=self.copies)

    def _round(self, types: Types, paths: "list[str] | tuple[str, ...]") -> None:
        for path in paths:
            if path in types:
                weight = self.decoder.model.get_submodule(path).get_parameter("weight")
                self.decoder.fill({f"{path}.weight": self._rounded(path, types[path], weight)})

    def _rounded(self, path: str, name: str, W: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        """W with as much of a type's error as a sweep leaves."""
        grid = self._grid(path, name, W)
        left, found = float(self.roundings[f"left {path}"]), torch.empty_like(W)
        for start in range(0, len(W), step := max(1, AT_ONCE // W.shape[1])):
            some = W[start : start + step]
            values = grid.rows(start, start + step).dequantized(some).to(W.dtype)
            found[start : start + step] = some.lerp(values, left)
        return found

    def _grid(self, path: str, name: str, W: Float[Tensor, "m n"]) -> Grid:
        """The grid of a matrix in a type, fitted once and kept in a file."""
        file = self.scratch / f"grid-{path}-{name}-{self.streams.processes.rank}.safetensors"
        if file.exists():
            parts = {key: part.to(W.device, W.dtype) for key, part in load_file(file).items()}
            if name in TYPES:
                return BlockGrid.of(TYPES[name], *(parts.get(key) for key in GRID_PARTS))  # type: ignore[arg-type]
            step = parts["step"]
            return Grid(QuantizationArgs.of_name(name), W.shape[1] // step.shape[1], step)
        variance = self.roundings.get(f"variance {path}")
        variance = None if variance is None else variance.to(W.device)
        grid = fitted(W, name, variance, stored=self.stored, trials=FEW)
        if isinstance(grid, BlockGrid):
            stored = zip(GRID_PARTS.items(), grid.parts, strict=True)
            save_file({key: part.to(dtype).contiguous() for (key, dtype), part in stored if part is not None}, file)
        else:
            save_file({"step": grid.step.to(self.stored)}, file)
        return grid
