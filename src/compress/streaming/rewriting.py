"""Giving linears one by one to the stages that work on them."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from compress.models.branch import Branch, captured_inputs
from compress.models.decoder import Decoder
from compress.numerics.lowrank import InputMoments
from compress.streaming.groups import EquationSums, Readers, Writers
from compress.streaming.linears import LinearSite, linear_shape
from compress.streaming.sites import Stage
from compress.streaming.stopwatch import Stopwatch
from compress.streaming.streams import Streams, rows
from compress.streaming.survey import Survey

Report = dict[str, Any]


class LinearRewriter:
    """
    stages: those that work on single linears. survey: of the dense model, where a stage asked for one.
    """

    def __init__(self, decoder: Decoder, stages: Sequence[Stage], survey: Survey | None, clock: Stopwatch) -> None:
        self.decoder = decoder
        self.stages = [stage for stage in stages if stage.site is LinearSite]
        self.survey = survey
        self.clock = clock

    def rewrite_group(self, group: Readers | Writers) -> list[Report]:
        """The linears of a group that has been written, by the inputs that it was fitted to."""
        if not self.stages or group.block == len(self.decoder.blocks):
            return []
        shared, reports = dict[tuple[int, int], InputMoments](), []
        for name, place in group.places().items():
            where = (place.start, place.stop)
            if where not in shared:
                shared[where] = group.moments(place)
            reports.append(self.rewrite(group.branch, group.block, name, shared[where]))
        return reports

    def rewrite_together(self, branch: Branch, block: int, streams: Streams, *, advance: bool) -> list[Report]:
        """Rewrite the linears by what the stream gives them in one pass of the branch as it is.

        advance: the stream goes on behind that pass, and sees nothing of what is rewritten.
        """
        sharing = [tuple(group.readers) for group in branch.reader_groups()] + [(name,) for name in branch.writers]
        firsts = [plain(branch.linear(names[0])) for names in sharing]
        sums = [EquationSums(linear.in_features, 0, self.decoder.device) for linear in firsts]
        for batch in streams.batches:
            stream, _ = streams.now(batch)
            with self.clock("forward"), captured_inputs(firsts) as given:
                update = streams.update(branch, stream, batch, block)
                if advance:
                    streams.compressed.put(batch.index, stream + update)
            with self.clock("statistics"):
                for place, its_sums in enumerate(sums):
                    its_sums.add(rows(given[place]), None)
        reports = []
        for names, its_sums in zip(sharing, sums, strict=True):
            inputs = its_sums.moments()
            reports += [self.rewrite(branch, block, name, inputs) for name in names]
        return reports

    def rewrite(self, branch: Branch, block: int, name: str, inputs: InputMoments) -> Report:
        decoder, module = self.decoder, plain(branch.linear(name))
        shape = linear_shape(f"{decoder.block_prefix(block)}{name}", name, decoder.family.part_of(name), module)
        site = LinearSite(
            name=f"block {block} {name}",
            shape=shape,
            module=module,
            inputs=inputs,
            put=lambda put: branch.replace_linear(name, put),
            gradient=None if self.survey is None else self.survey.gradient_at(shape.path, block, decoder.device),
        )
        with self.clock("solve"):
            for stage in self.stages:
                stage.apply(site)
        return site.report()


def plain(module: nn.Module) -> nn.Linear:
    """A linear that nothing has been done to yet."""
    assert isinstance(module, nn.Linear)
    return module
