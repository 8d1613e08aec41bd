"""Give linears to the stages that work on them, those with the same inputs together."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from compress.calibration.groups import Readers, Writers
from compress.calibration.linears import LinearShape, LinearSite, Rewritten
from compress.calibration.processes import Processes
from compress.calibration.sites import Stage
from compress.calibration.statistics import EquationSums, regularized, rows
from compress.calibration.streams import Streams
from compress.calibration.survey import Survey
from compress.calibration.weights import Layout
from compress.models.branch import Branch, captured_inputs
from compress.models.decoder import Decoder
from compress.models.factors import AnyLinear, Written, in_form
from compress.numerics.moments import InputMoments
from compress.progress import Stopwatch

Report = dict[str, Any]


@dataclass
class LinearRewriter:
    """Apply the stages on single linears to those of a branch that have been fitted.

    stages: of these, those that work on single linears are applied. layout: the form that linears are written in.
    survey: of the dense model, where a stage asked for one. processes: those that the inputs come from.
    """

    decoder: Decoder
    stages: Sequence[Stage]
    layout: Layout
    survey: Survey | None
    clock: Stopwatch
    processes: Processes

    def __post_init__(self) -> None:
        self.stages = [stage for stage in self.stages if stage.site is LinearSite]

    def rewrite_group(self, group: Readers | Writers) -> list[Report]:
        """Rewrite the linears of a group that has been written, by the inputs that it was fitted to.

        Readers beside experts are left to `rewrite_together`: the group's inputs are all tokens'.
        """
        apart = isinstance(group, Readers) and group.branch.experts
        if not self.stages or group.block == len(self.decoder.blocks) or apart:
            return []
        places, reports = group.places(), []
        sharing = [[*places]] if isinstance(group, Readers) else [[name] for name in places]
        for names in sharing:
            inputs = group.moments(places[names[0]])
            reports += self.rewrite(group.branch, group.block, names, inputs, group.tokens)
        return reports

    def rewrite_together(
        self, branch: Branch, block: int, streams: Streams, *, advance: bool = False, readers_only: bool = False
    ) -> list[Report]:
        """Rewrite the linears by their inputs in one pass of the unchanged branch.

        advance: the stream goes on after that pass, and sees nothing of what is rewritten.
        """
        if not self.stages:
            return []
        sharing = [names for names in branch.sharing() if names[0] in branch.readers or not readers_only]
        firsts = [plain(branch.linear(names[0])) for names in sharing]
        sums = [EquationSums(linear.in_features, 0, self.decoder.device) for linear in firsts]
        for batch in streams.batches:
            stream, _ = streams.now(batch)
            with self.clock("forward"), captured_inputs(firsts) as given:
                update = streams.update(branch, stream, batch, block)
                if advance:
                    streams.compressed.put(batch.index, stream + update)
            with self.clock("statistics"):
                for place, x in given.items():
                    sums[place].add(rows(x))
        experts = {name for expert in branch.experts for name in (*expert.readers, *expert.writers)}
        reports: list[Report] = []
        every: InputMoments | None = None
        for names, its_sums in zip(sharing, sums, strict=True):
            with self.clock("statistics"):
                like = every if names[0] in branch.readers else None
                filled = regularized(its_sums, self.processes, like) if names[0] in experts else None
                inputs = its_sums.moments(self.processes) if filled is None else filled.moments()
            every = every or inputs  # of all tokens: the first linears of a branch are no expert's
            reports += self.rewrite(branch, block, names, inputs, None if filled is None else filled.tokens)
        return reports

    def rewrite(
        self, branch: Branch, block: int, names: Sequence[str], inputs: InputMoments, tokens: int | None
    ) -> list[Report]:
        """Rewrite linears. inputs: of all these. tokens: how many an expert was given; None where all tokens pass."""
        decoder, survey, sites, lifted = self.decoder, self.survey, list[LinearSite](), None
        for name in names:
            module, path = plain(branch.linear(name)), f"{decoder.block_prefix(block)}{name}"
            gradient = None if survey is None else partial(survey.gradient_at, path, block, decoder.device)
            site = LinearSite(
                name=f"block {block} {name}",
                shape=LinearShape.of(path, name, decoder.family.part_of(name), module),
                module=module,
                inputs=inputs,
                put=partial(branch.replace_linear, name),
                read_gradient=gradient,
                notes={} if tokens is None else {"tokens": tokens, "wanted": module.in_features},
            )
            sites.append(site)
        with self.clock("solve"):
            for stage in self.stages:
                if stage.in_written_form:
                    lifted = lifted or inputs.lifted(self.layout.form(branch, names[0]).inputs)
                    sites = [self._in_written_form(branch, site, lifted) for site in sites]
                stage.apply_together(sites)
            for site in sites:
                self.processes.follow(*site.module.state_dict().values())
        return [{"linear": site.shape.path, **site.notes} for site in sites]

    def _in_written_form(self, branch: Branch, site: LinearSite, inputs: InputMoments) -> LinearSite:
        """Bring a linear into the checkpoint's form; the walk goes on with it through a change of form."""
        name = site.shape.name
        form, width = self.layout.form(branch, name), branch.in_features(name)
        if form.is_identity:
            return site
        assert isinstance(site.module, AnyLinear)
        module = in_form(site.module, form)

        def put(linear: Rewritten) -> None:
            branch.replace_linear(name, Written(linear, form, width))

        put(module)
        last: nn.Linear = module if isinstance(module, nn.Linear) else module.second
        shape = replace(site.shape, m=module.out_features, n=module.in_features, has_bias=last.bias is not None)
        return replace(site, shape=shape, module=module, inputs=inputs, put=put, read_gradient=None)


def plain(module: nn.Module) -> nn.Linear:
    assert isinstance(module, nn.Linear)
    return module
