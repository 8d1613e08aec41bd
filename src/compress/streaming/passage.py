"""How the streams pass a branch while its weights are rewritten.

The compressed stream passes through the *compressed* prefix, so whatever is decided sees the error of what was
compressed before it. At each branch:

    the readers take the stream in its present basis; where stages work on groups of linears, they are fitted first
    the dense stream advances through the branch as it is, where some stage compares with it
    the branch runs; its output is taken in the dense basis, and the point's statistics decide the next basis
    the writers write in that basis; where stages work on groups of linears, they are fitted, and the branch runs again

Without such groups nothing is run a second time. The reference code of SliceGPT runs each block twice.

Shapes: stream (windows, tokens, d) in the present basis, (windows, tokens, D) in the dense one, decode (d, D),
encode (D, d).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from compress.models.branch import Branch, captured_inputs, read_through, write_through
from compress.models.decoder import Decoder
from compress.numerics.frames import Frame
from compress.numerics.norms import rms_normed
from compress.numerics.ridge import NormalEquations
from compress.streaming.groups import (
    EquationSums,
    LinearGroup,
    Readers,
    Writers,
    all_biased,
    with_constant,
    writer_linears,
    writer_matrix,
)
from compress.streaming.layout import Layout
from compress.streaming.sites import Basis, Stage, StreamPoint
from compress.streaming.statistics import Accumulator, Need
from compress.streaming.stopwatch import Stopwatch
from compress.streaming.streams import Batch, Streams

# Tokens whose logits are held at a time: a row of them is as wide as the vocabulary.
LOGITS_AT_ONCE = 256

Gathered = dict[Need, Accumulator]
Report = dict[str, Any]


class Passage:
    """
    frame: what the bases of all points are of, where they share one.
    decode: takes the compressed stream where it is now back to the dense basis; None while it is in that basis.
    """

    def __init__(
        self,
        decoder: Decoder,
        streams: Streams,
        stages: Sequence[Stage],
        layout: Layout,
        clock: Stopwatch,
        frame: Frame | None,
    ) -> None:
        self.decoder = decoder
        self.streams = streams
        self.stages = stages
        self.layout = layout
        self.clock = clock
        self.frame = frame
        self.decode: Float64[Tensor, "d D"] | None = None
        self.fits_groups = any(issubclass(stage.site, LinearGroup) for stage in stages)
        self.eps = decoder.family.epsilon(decoder.config)

    def embed(self, branch: Branch, point: StreamPoint) -> None:
        """The embeddings, which must be in the decoder, and both streams behind them."""
        self._apply(branch)
        with self.clock("forward"):
            self.streams.embed()
        gathered = self._accumulators(point)
        with self.clock("statistics"):
            for batch in self.streams.batches:
                for accumulator in gathered.values():
                    accumulator.add(*self.streams.now(batch))
        self._decide(point, gathered)
        self._change_basis(branch, point)
        self.layout.settle(branch)

    def through(self, branch: Branch, point: StreamPoint, block: int) -> list[Report]:
        """A branch of a block, from the point before it to `point`; reports on the groups that stages worked on."""
        self._apply(branch)
        readers = self._readers(branch, block) if self.fits_groups else None
        self._advance_dense(branch, block)
        reports = self._enter(branch, readers)
        if self.fits_groups:
            reports += self._fit_writers(branch, point, block)
            self._advance(branch, block)
        else:
            self._run_wide(branch, point, block)
            self._change_basis(branch, point)
        self.layout.settle(branch)
        return reports

    def read_out(self, head: Branch) -> tuple[list[Report], float | None]:
        """The head, and the divergence of its logits from the dense model's on held-out windows."""
        self._apply(head)
        readers = self._readers(head, len(self.decoder.blocks)) if self.fits_groups else None
        dense = copy_linears(head.readers.values())
        reports = self._enter(head, readers)
        divergence = self._divergence(head, dense)
        self.layout.settle(head)
        return reports, divergence

    def _apply(self, site: Branch | LinearGroup | StreamPoint) -> None:
        for stage in self.stages:
            if isinstance(site, stage.site):
                stage.apply(site)

    def _readers(self, branch: Branch, block: int) -> Readers:
        """The readers as a group, fitted by the stages but not written: the dense stream is yet to pass them."""
        width, has_bias = self.decoder.dense_width, all_biased(branch.readers.values())
        decode = self.decode if self.decode is not None else torch.eye(width, dtype=torch.float64)
        sums = EquationSums(len(decode) + has_bias, width, self.decoder.device)
        with self.clock("statistics"):
            for batch in self.streams.batches:
                stream, dense = self.streams.now(batch)
                assert dense is not None
                u = with_constant(self._normed_rows(stream), bias=has_bias)
                sums.add(u, self._normed_rows(dense), weights=None, held_out=batch.held_out)
        start = decode.to(sums.fit.G.device)
        if has_bias:
            start = torch.cat([start, start.new_zeros(1, width)])
        group = Readers(f"{branch.name} readers", block, branch, sums.fit, sums.held_out, start)
        with self.clock("solve"):
            self._apply(group)
        return group

    def _enter(self, branch: Branch, readers: Readers | None) -> list[Report]:
        """Let the readers take the compressed stream."""
        if readers is not None:
            readers.write()
            return [readers.close()]
        if self.decode is not None:
            read_through(branch, self.decode)
        return []

    def _advance_dense(self, branch: Branch, block: int) -> None:
        if self.streams.dense is None or branch.run is None:
            return
        with self.clock("forward"):
            for batch in self.streams.batches:
                _, dense = self.streams.now(batch)
                assert dense is not None
                arguments = self.streams.arguments[batch.index][block]
                self.streams.dense.put(batch.index, dense + branch.run(dense, arguments))

    def _run_wide(self, branch: Branch, point: StreamPoint, block: int) -> None:
        """Run the branch, its output in the dense basis, and decide the point's basis by what came out."""
        gathered = self._accumulators(point)
        for batch in self.streams.batches:
            stream, dense = self.streams.now(batch)
            with self.clock("forward"):
                wide = self._wide(stream) + self._update(branch, stream, batch, block)
                self.streams.compressed.put(batch.index, wide)
            with self.clock("statistics"):
                for accumulator in gathered.values():
                    accumulator.add(wide, dense)
        self._decide(point, gathered)

    def _fit_writers(self, branch: Branch, point: StreamPoint, block: int) -> list[Report]:
        """Run the branch to see what its writers are given; encode and fit them."""
        d_in = self.streams.compressed.stored(0).shape[-1]
        sums, gathered = self._gather_writers(branch, point, block)
        self._decide(point, gathered)
        encode = self._write_in_basis(branch, point)
        carried = d_in if branch.shortcut is None else 0
        fit, held_out = (encoded(equations, encode, carried=carried) for equations in (sums.fit, sums.held_out))
        group = Writers(f"{branch.name} writers", block, branch, fit, held_out, writer_matrix(branch))
        with self.clock("solve"):
            self._apply(group)
        group.write()
        return [group.close()]

    def _gather_writers(self, branch: Branch, point: StreamPoint, block: int) -> tuple[EquationSums, Gathered]:
        """Second moments of (z, inputs of the writers, 1), and with the dense stream; the point's statistics beside."""
        linears = writer_linears(branch)
        has_bias = any(linear.bias is not None for linear in linears)
        d_in = self.streams.compressed.stored(0).shape[-1]
        inputs = d_in + sum(linear.in_features for linear in linears) + has_bias
        sums, gathered = EquationSums(inputs, self.decoder.dense_width, self.decoder.device), self._accumulators(point)
        for batch in self.streams.batches:
            stream, dense = self.streams.now(batch)
            assert dense is not None
            with self.clock("forward"), captured_inputs(linears) as given:
                update = self._update(branch, stream, batch, block)
            with self.clock("statistics"):
                if gathered:
                    wide = self._wide(stream) + update
                    for accumulator in gathered.values():
                        accumulator.add(wide, dense)
                columns = [stream, *(given[place] for place in range(len(linears)))]
                u = with_constant(torch.cat([rows(column) for column in columns], dim=1), bias=has_bias)
                t = rows(dense).double()
                weights = 1 / (t.square().mean(-1, keepdim=True) + self.eps)
                sums.add(u, t, weights=weights, held_out=batch.held_out)
        return sums, gathered

    def _advance(self, branch: Branch, block: int) -> None:
        with self.clock("forward"):
            for batch in self.streams.batches:
                stream, _ = self.streams.now(batch)
                update = self._update(branch, stream, batch, block)
                self.streams.compressed.put(batch.index, branch.carried(stream) + update)

    def _update(self, branch: Branch, stream: Tensor, batch: Batch, block: int) -> Tensor:
        if branch.run is None:
            raise ValueError(f"{branch.name} cannot be run.")
        update: Tensor = branch.run(stream, self.streams.arguments[batch.index][block])
        return update

    def _wide(self, stream: Tensor) -> Float[Tensor, "*batch D"]:
        """The compressed stream in the dense basis."""
        return stream if self.decode is None else stream @ self.decode.to(self.decoder.dtype)

    def _normed_rows(self, stream: Tensor) -> Float64[Tensor, "tokens d"]:
        return rms_normed(rows(stream).double(), self.decoder.dense_width, self.eps)

    def _accumulators(self, point: StreamPoint) -> Gathered:
        stages = [stage for stage in self.stages if stage.site is StreamPoint]
        needs = dict.fromkeys(need for stage in stages for need in stage.needs)
        return {need: need.accumulator(point.dense_width, self.eps, self.decoder.device) for need in needs}

    def _decide(self, point: StreamPoint, gathered: Mapping[Need, Accumulator]) -> None:
        """Ask the stages for the point's basis."""
        point.statistics = {need: accumulator.value() for need, accumulator in gathered.items()}
        if self.frame is not None:
            point.basis = Basis(self.frame, width=point.dense_width)
        with self.clock("eigensolve"):
            self._apply(point)

    def _write_in_basis(self, branch: Branch, point: StreamPoint) -> Float64[Tensor, "D d"] | None:
        """Let the branch write in the point's basis, and the stream pass it by a shortcut where bases differ.

        The encode matrix; None where the stream stays as it is.
        """
        change = point.change(self.layout.directions(point.width))
        if change is None:
            return None
        encode, decode = change
        write_through(branch, encode)
        if branch.readers and self.frame is None:
            branch.set_shortcut(encode if self.decode is None else self.decode @ encode, self.decoder.dtype)
        self.decode = decode
        return encode

    def _change_basis(self, branch: Branch, point: StreamPoint) -> None:
        """Carry the branch's writers and the cached stream from the dense basis into the point's."""
        with self.clock("rotate"):
            encode = self._write_in_basis(branch, point)
            if encode is None:
                return
            narrow = encode.to(self.decoder.dtype)
            for batch in self.streams.batches:
                stream, _ = self.streams.now(batch)
                self.streams.compressed.put(batch.index, stream @ narrow)

    def _divergence(self, head: Branch, dense_readers: Sequence[nn.Linear]) -> float | None:
        """KL(dense || compressed) of the next token, in nats, the mean over held-out tokens."""
        batches = [batch for batch in self.streams.batches if batch.held_out]
        if self.streams.dense is None or not batches:
            return None
        total, tokens = 0.0, 0
        (linear,), (dense_linear,) = head.readers.values(), dense_readers
        assert head.norm is not None
        with self.clock("forward"):
            for batch in batches:
                streams, denses = self.streams.now(batch)
                assert denses is not None
                for stream, dense in zip(
                    *(rows(both).split(LOGITS_AT_ONCE) for both in (streams, denses)), strict=True
                ):
                    total += kl_divergence(dense_linear(head.norm(dense)), linear(head.norm(stream)))
                    tokens += len(dense)
        return total / tokens


def rows(stream: Float[Tensor, "windows tokens d"]) -> Float[Tensor, "_ d"]:
    return stream.reshape(-1, stream.shape[-1])


def encoded(equations: NormalEquations, encode: Float64[Tensor, "D d"] | None, *, carried: int) -> NormalEquations:
    """The equations of the writers from those of (z, inputs): t = x encode, less z where it is carried on as it is.

    carried: the width of z where no shortcut takes it in, 0 where one does and z stays an input.
    """
    B = equations.B if encode is None else equations.B @ encode
    if carried:
        G = equations.G[carried:]
        return NormalEquations(G[:, carried:], B[carried:] - G[:, :carried], equations.tokens)
    return NormalEquations(equations.G, B, equations.tokens)


def copy_linears(linears: Iterable[nn.Linear]) -> list[nn.Linear]:
    """The linears as they are now; their weights are replaced, never written into, so nothing is copied."""
    copies = []
    for linear in linears:
        with torch.device("meta"):
            copy = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
        copy.weight, copy.bias = linear.weight, linear.bias
        copies.append(copy)
    return copies


def kl_divergence(dense: Float[Tensor, "*tokens vocabulary"], compressed: Float[Tensor, "*tokens vocabulary"]) -> float:
    p, q = dense.double().log_softmax(-1), compressed.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum())


def num_streams(stages: Iterable[Stage]) -> int:
    """1, the compressed stream, or 2 where a stage compares with the dense one."""
    compared = any(need.dense for stage in stages for need in stage.needs)
    return 2 if compared or any(issubclass(stage.site, LinearGroup) for stage in stages) else 1
