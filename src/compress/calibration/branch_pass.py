"""Propagate the calibration activations through a branch while its weights are fitted.

The compressed stream passes through the *compressed* prefix, so whatever is decided sees the error of what was
compressed before it. At each branch:

    the readers take the stream in its present basis; where stages work on groups of linears, they are fitted first
    the dense stream advances through the branch as it is, where some stage compares with it
    the branch runs; its output is taken in the dense basis, and the point's statistics decide the next basis
    the writers write in that basis; where stages work on groups of linears, they are fitted, and the branch runs again,
    or the writer alone where its inputs are kept

Single linears are rewritten with their group: readers before the branch runs, writers before it runs again. Without
groups nothing is run a second time (SliceGPT's code runs each block twice), and linears that go by plain inputs are all
rewritten by what one pass of the unchanged branch gives them. Where these are to be the dense model's own, the stream
goes on after that pass and stays the dense model's.

Shapes: stream (windows, tokens, d) in the present basis, (windows, tokens, D) in the dense one, decode (d, D),
encode (D, d).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from compress.calibration.depth import DroppedBlocks
from compress.calibration.groups import (
    LinearGroup,
    Readers,
    Writers,
    all_biased,
    chunks,
    gather_experts,
    with_constant,
    writer_linears,
    writer_matrix,
)
from compress.calibration.linears import LinearSite
from compress.calibration.rewriting import LinearRewriter, Report
from compress.calibration.sites import Basis, Stage, StreamPoint, Table, follows_dense, is_anchored, rotates_points
from compress.calibration.statistics import EquationSums, PointStatistics, rows
from compress.calibration.streams import Batch, Streams, mean_divergence
from compress.calibration.survey import Survey
from compress.calibration.weights import Layout
from compress.models.branch import Branch, captured_inputs, input_of, read_through, write_through
from compress.models.decoder import Decoder
from compress.models.factors import Written, WrittenForm, in_form
from compress.numerics.frames import Frame
from compress.numerics.moments import InputMoments
from compress.numerics.ridge import NormalEquations
from compress.progress import Stopwatch, return_free_memory


@dataclass
class BranchPass:
    """Take the stream through one branch after another, and let stages change each on the way.

    survey: of the dense model, where a stage asked for one.
    frame: what the bases of all points are of, where they share one.
    dropped: blocks of the dense model that this one lacks.
    decode: takes the compressed stream where it is now back to the dense basis; None while it is in that basis.
    stored: of the tables quantized last, by path, the tensors below it.
    writer_inputs: of the present branch, by batch; none where they are not kept.
    """

    decoder: Decoder
    streams: Streams
    stages: Sequence[Stage]
    layout: Layout
    clock: Stopwatch
    survey: Survey | None
    frame: Frame | None
    dropped: DroppedBlocks | None = None
    decode: Float64[Tensor, "d D"] | None = None
    stored: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    writer_inputs: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.processes = self.streams.processes
        self.rewriter = LinearRewriter(self.decoder, self.stages, self.layout, self.survey, self.clock, self.processes)
        self.rotates_points = self.frame is None and rotates_points(self.stages)
        self.follows_dense, self.is_anchored = follows_dense(self.stages), is_anchored(self.stages)
        self.eps = self.decoder.family.epsilon(self.decoder.config)

    def embed(self, branch: Branch, point: StreamPoint) -> None:
        """Compress the embeddings, which must be loaded, and start both streams."""
        self._apply(branch)
        with self.clock("forward"):
            self.streams.embed()
        self._pass_dropped(-1)
        found = self._statistics(point)
        with self.clock("statistics"):
            for batch in self.streams.batches if found else ():
                found.add(*self.streams.now(batch))
        self._decide(point, found)
        self._change_basis(branch, point)
        self.layout.settle(branch)
        names = self.decoder.family.embeddings
        self.quantize_tables({name: self.decoder.model.get_submodule(name) for name in names})
        if self.stored and self.decode is None:
            with self.clock("forward"):
                self.streams.embed(dense=False)

    def through(self, branch: Branch, point: StreamPoint, block: int) -> list[Report]:
        """Compress a branch of a block and advance the streams to `point`; return reports on groups and linears."""
        self._apply(branch)
        if self.follows_dense:
            reports = self.rewriter.rewrite_together(branch, block, self.streams, advance=True)
        elif self.is_anchored:
            readers = self._readers(branch, block)
            self._advance_dense(branch, block)
            # What the writers are fitted to is the stream after the dropped blocks, unless a norm lies between.
            ahead, is_last = branch.post_norm is None, point.index % len(self.decoder.family.branches) == 0
            if is_last and ahead:
                self._pass_dropped(block)
            reports = self._enter(branch, readers)
            fit_writers = self._fit_experts if branch.experts else self._fit_writers
            reports += fit_writers(branch, point, block)
            if is_last and not ahead:
                self._pass_dropped(block)
            self._advance(branch, block)
        else:
            self._advance_dense(branch, block)
            if point.index % len(self.decoder.family.branches) == 0:
                self._pass_dropped(block)
            reports = self._enter(branch, [])
            reports += self.rewriter.rewrite_together(branch, block, self.streams)
            found = self._statistics(point)
            self._run_wide(branch, block, found, advance=True)
            self._decide(point, found)
            self._change_basis(branch, point)
        self.layout.settle(branch)
        return reports

    def read_out(self, head: Branch) -> tuple[list[Report], float | None]:
        """Compress the head; return reports and the held-out divergence from the dense model."""
        self._apply(head)
        fitted = self.is_anchored and not self.layout.ties_head
        readers = self._readers(head, len(self.decoder.blocks)) if fitted else []
        (reader,) = head.readers.values()
        weight, bias = reader.weight, reader.bias  # replaced, never written in place
        reports = self._enter(head, readers)
        form = self.layout.form(head, self.decoder.family.last_reader)
        has_tables = any(stage.site is Table for stage in self.stages)
        # A bias may become a column of the written weight, which is then known when the head is settled.
        is_late = bias is not None and not form.is_identity
        inputs = self._head_inputs(head) if has_tables else None
        if has_tables and not is_late:
            self._quantize_head(head, form, inputs)
        with self.clock("forward"):
            divergence = mean_divergence(head, weight, bias, self.streams)
        self.layout.settle(head)
        if has_tables and is_late:
            self._quantize_head(head, WrittenForm(), None if inputs is None else inputs.lifted(form.inputs))
        return reports, divergence

    def _head_inputs(self, head: Branch) -> InputMoments | None:
        """Moments of what a head by itself is given; None where it is the embeddings' table."""
        name = self.decoder.family.head
        if self.layout.ties_head or name not in head.readers:
            return None
        assert head.norm is not None
        sums = EquationSums(head.in_features(name), 0, self.decoder.device)
        with self.clock("statistics"):
            for batch in self.streams.batches:
                if not batch.held_out:
                    sums.add(rows(head.norm(self.streams.now(batch)[0])))
            return sums.moments(self.processes)

    def _quantize_head(self, head: Branch, form: WrittenForm, inputs: InputMoments | None) -> None:
        """Quantize the head in its written form; the walk goes on with it through a change of form."""
        family = self.decoder.family
        module, name = self.decoder.model.get_submodule(family.head), family.last_reader
        width = head.in_features(name)
        if not form.is_identity:
            module = in_form(head.linear(name), form)
        path = family.embeddings[0] if self.layout.ties_head else family.head
        self.quantize_tables({path: module}, None if inputs is None else inputs.lifted(form.inputs))
        if not form.is_identity:
            head.replace_linear(name, Written(module, form, width))

    def quantize_tables(self, tables: Mapping[str, nn.Module], inputs: InputMoments | None = None) -> None:
        """Give tables, by their paths, to the stages that quantize them; what is stored of them goes to `stored`."""
        self.stored = {}
        for path, module in tables.items():
            weight = module.get_parameter("weight")
            site = Table(path, weight.detach(), inputs)
            with self.clock("solve"):
                self._apply(site)
            if site.values is not None:
                self.processes.follow(site.values, *site.stored.values())
                # Not in place: the dense model's head may be the same tensor.
                module.register_parameter("weight", nn.Parameter(site.values.to(weight.dtype), requires_grad=False))
                self.stored[path] = site.stored

    def _apply(self, site: Branch | LinearGroup | LinearSite | StreamPoint | Table) -> None:
        for stage in self.stages:
            if isinstance(site, stage.site):
                stage.apply(site)
        if isinstance(site, LinearGroup):
            self.processes.follow(site.matrix)

    def _readers(self, branch: Branch, block: int) -> list[Readers]:
        """Fit the readers' groups without writing them: the dense stream has yet to pass the branch."""
        width, groups = self.decoder.dense_width, []
        decode = self.decode if self.decode is not None else torch.eye(width, dtype=torch.float64)
        for part in branch.reader_groups():
            has_bias = all_biased(part.readers.values())
            sums = EquationSums(len(decode) + has_bias, width, self.decoder.device)
            with self.clock("statistics"):
                for batch, stream, dense in self.streams.both():
                    u = with_constant([rows(part.norm(stream))], bias=has_bias)
                    sums.add(u, rows(part.norm(dense)), held_out=batch.held_out)
                equations = sums.close(self.processes)
            start = decode.to(self.decoder.device)
            if has_bias:
                start = torch.cat([start, start.new_zeros(1, width)])
            group = Readers(f"{branch.name} readers", block, branch, *equations, start, readers=part.readers)
            with self.clock("solve"):
                self._apply(group)
            groups.append(group)
        return groups

    def _enter(self, branch: Branch, groups: Sequence[Readers]) -> list[Report]:
        """Write the fitted readers, so that they take the compressed stream."""
        if not groups and self.decode is not None:
            read_through(branch, self.decode)
        return [report for group in groups for report in self._written(group)]

    def _written(self, group: Readers | Writers) -> list[Report]:
        group.write()
        return [*self.rewriter.rewrite_group(group), group.close()]

    def _advance_dense(self, branch: Branch, block: int) -> None:
        if self.streams.dense is None:
            return
        post_norms = [] if branch.post_norm is None else [branch.owner.get_submodule(branch.post_norm)]
        with self.clock("forward"):
            for batch, _, dense in self.streams.both():
                with captured_inputs(post_norms) as given:
                    self.streams.dense.put(batch.index, dense + self.streams.update(branch, dense, batch, block))
                if self.streams.before_post_norm is not None and given:
                    self.streams.before_post_norm.put(batch.index, given[0])

    def _pass_dropped(self, block: int) -> None:
        if self.dropped is not None:
            with self.clock("forward"):
                self.dropped.advance(self.streams, block)

    def _run_wide(self, branch: Branch, block: int, found: PointStatistics, *, advance: bool = False) -> None:
        """Run the branch, its output in the dense basis, for the statistics of what comes out."""
        return_free_memory()  # what the last change of basis left
        for batch in self.streams.batches:
            stream, dense = self.streams.now(batch)
            with self.clock("forward"):
                wide = self._wide(stream) + self.streams.update(branch, stream, batch, block)
                if advance:
                    self.streams.compressed.put(batch.index, wide)
            with self.clock("statistics"):
                found.add(wide, dense)
        return_free_memory()

    def _fit_writers(self, branch: Branch, point: StreamPoint, block: int) -> list[Report]:
        """Run the branch to see what its writers are given; encode and fit them."""
        sums, found = self._gather_writers(branch, point, block)
        self._decide(point, found)
        encode = self._write_in_basis(branch, point)
        fit, held_out, inputs = sums.close(self.processes)
        if self.rotates_points and encode is not None:
            # Targets in the point's basis.
            fit, held_out = (NormalEquations(each.G, each.B @ encode, each.tokens) for each in (fit, held_out))
        name, matrix = f"{branch.name} writers", writer_matrix(branch)
        group = Writers(name, block, branch, fit, held_out, inputs, matrix, processes=self.processes)
        with self.clock("solve"):
            self._apply(group)
        return self._written(group)

    def _fit_experts(self, branch: Branch, point: StreamPoint, block: int) -> list[Report]:
        """Encode the experts of a branch and fit them, each by its own tokens."""
        reports = self.rewriter.rewrite_together(branch, block, self.streams, readers_only=True)
        found = self._statistics(point)
        if found:
            self._run_wide(branch, block, found)
        self._decide(point, found)
        encode = self._write_in_basis(branch, point)
        for numbers in chunks(branch.experts, self.decoder.dense_width):
            with self.clock("statistics"):
                equations = gather_experts(branch, numbers, block, self.streams, self._weigh, encode)
            for number, (given, held_out) in zip(numbers, equations, strict=True):
                expert = branch.experts[number]
                matrix, name = writer_matrix(expert), f"{expert.name} writers"
                group = Writers(name, block, expert, given.fit, held_out, given.inputs, matrix, given.tokens)
                group.processes = self.processes
                with self.clock("solve"):
                    self._apply(group)
                reports += self._written(group)
        return reports

    def _gather_writers(self, branch: Branch, point: StreamPoint, block: int) -> tuple[EquationSums, PointStatistics]:
        """Gather the writers' normal equations and the point's statistics.

        Where each point is rotated by itself, the basis is not known yet: the stream, which passes by a shortcut, comes
        first among the inputs, and targets are in the dense basis.
        """
        linears = writer_linears(branch)
        has_bias = any(linear.bias is not None for linear in linears)
        encode = self._shared_encode(point)
        width = self.decoder.dense_width if encode is None else encode.shape[1]
        stream_width = self.streams.compressed.stored(0).shape[-1] if self.rotates_points else 0
        inputs = stream_width + sum(linear.in_features for linear in linears) + has_bias
        sums, found = EquationSums(inputs, width, self.decoder.device), self._statistics(point)
        # All that the branch writes is one writer's output, whose inputs fit in memory and last until it is fitted.
        alone = len(linears) == len(branch.writers) == 1 and branch.post_norm is None and branch.shortcut is None
        keeps = alone and not (found or self.rotates_points) and self.streams.have_room_for(linears[0].in_features)
        for batch, stream, dense in self.streams.both():
            with self.clock("forward"):
                if keeps:
                    run = partial(self.streams.update, branch, stream, batch, block)
                    given = {0: input_of(linears[0], run)}
                    self.writer_inputs.append(given[0])
                else:
                    with captured_inputs(linears) as given:
                        update = self.streams.update(branch, stream, batch, block)
            with self.clock("statistics"):
                if found:
                    found.add(self._wide(stream) + update, dense)
                z = [rows(stream) / branch.scale] if self.rotates_points else []
                u = with_constant([*z, *(rows(given[place]) for place in range(len(linears)))], bias=has_bias)
                t, weights = self._target(branch, batch, stream, dense, encode)
                sums.add(u, t, weights=weights, held_out=batch.held_out)
        return sums, found

    def _shared_encode(self, point: StreamPoint) -> Float64[Tensor, "D d"] | None:
        """The encode matrix of a point of a shared frame; None where there is none, or each point has its own."""
        if self.frame is None:
            return None
        point.basis = Basis(self.frame, width=point.dense_width, is_shared=True)
        for stage in self.stages:
            if isinstance(point, stage.site) and not stage.requires.statistics:
                stage.apply(point)
        change = point.change(self.layout.directions(point.width))
        assert change is not None
        return change[0].to(self.decoder.dtype)

    def _target(
        self, branch: Branch, batch: Batch, stream: Tensor, dense: Tensor, encode: Float[Tensor, "D d"] | None
    ) -> tuple[Float[Tensor, "tokens d"], Float[Tensor, "tokens 1"]]:
        """The targets of a branch's writers for a batch, and its token weights.

        That is what takes the compressed stream to the dense one, over what the branch multiplies it by. Where a norm
        is after the branch, it is to be given what it is given in the dense model: the writer's own outputs there, or
        the stream that has taken these in. Tokens weigh as the next norm will weigh them, and as the norm after the
        branch does: an error e before a norm of y is of the order of e / rms(y) after it.
        """
        t = rows(dense)
        weights = self._weigh(t)
        if branch.post_norm is not None:
            assert self.streams.before_post_norm is not None
            t = rows(self.streams.before_post_norm.get(batch.index, self.decoder.device))
            weights = weights * self._weigh(t)
        if encode is not None:
            t = t @ encode
        if not self.rotates_points and not (branch.post_norm is not None and branch.post_norm_of == "update"):
            t = t - rows(stream)
        return t / branch.scale, weights

    def _advance(self, branch: Branch, block: int) -> None:
        kept, self.writer_inputs = self.writer_inputs, []
        if kept and any(branch.in_features(name) != kept[0].shape[-1] for name in branch.writers):
            kept = []  # units have been deleted
        with self.clock("forward"):
            for batch in self.streams.batches:
                stream, _ = self.streams.now(batch)
                if kept:
                    update = branch.write(kept[batch.index]).view(*stream.shape[:-1], -1)
                else:
                    update = self.streams.update(branch, stream, batch, block)
                self.streams.compressed.put(batch.index, branch.carried(stream) + update)

    def _wide(self, stream: Tensor) -> Float[Tensor, "*batch D"]:
        return stream if self.decode is None else stream @ self.decode.to(self.decoder.dtype)

    def _weigh(self, t: Float[Tensor, "tokens D"]) -> Float[Tensor, "tokens 1"]:
        """Token weights: the inverse square of what the next norm will divide by."""
        mean: Tensor | float = t.mean(-1, keepdim=True) if self.decoder.family.norm == "layer" else 0.0
        return 1 / ((t - mean).square().mean(-1, keepdim=True) + self.eps)

    def _statistics(self, point: StreamPoint) -> PointStatistics:
        stages = [stage for stage in self.stages if stage.site is StreamPoint]
        needs = dict.fromkeys(need for stage in stages for need in stage.requires.statistics)
        return PointStatistics(needs, point.dense_width, self.eps, self.decoder.device)

    def _decide(self, point: StreamPoint, found: PointStatistics) -> None:
        point.statistics = found.close(self.processes)
        if self.frame is not None:
            point.basis = Basis(self.frame, width=point.dense_width, is_shared=True)
        with self.clock("eigensolve"):
            self._apply(point)
        if point.basis is not None and not point.basis.is_shared:
            self.processes.follow(*point.basis.frame.tensors)
            point.basis.width = self.processes.from_first(point.basis.width)

    def _write_in_basis(self, branch: Branch, point: StreamPoint) -> Float64[Tensor, "D d"] | None:
        """Encode the branch's writers into the point's basis; where bases differ, the stream passes by a shortcut.

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
