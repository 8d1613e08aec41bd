"""Give linears to the stages that work on them, those with the same inputs together."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from torch import nn

from compress.calibration.experts import regularized
from compress.calibration.groups import EquationSums, Readers, Writers
from compress.calibration.layout import Layout
from compress.calibration.linears import LinearSite, Rewritten, linear_shape, no_gradient
from compress.calibration.processes import ALONE, Processes
from compress.calibration.resources import Stopwatch
from compress.calibration.sites import Stage
from compress.calibration.streams import Streams, rows
from compress.calibration.survey import Survey
from compress.models.branch import Branch, captured_inputs
from compress.models.decoder import Decoder
from compress.models.factors import AnyLinear, Written, WrittenForm, in_form
from compress.numerics.lowrank import InputMoments

Report = dict[str, Any]


@dataclass(frozen=True)
class SharedInputs:
    """Moments of the inputs that several linears share, in the walk's form and in the checkpoint's.

    tokens: how many an expert was given; None for linears that all tokens pass.
    """

    inputs: InputMoments
    form: WrittenForm
    tokens: int | None = None

    @cached_property
    def written(self) -> InputMoments:
        return self.inputs.lifted(self.form.inputs)


class LinearRewriter:
    """
    stages: those that work on single linears. layout: the form that linears are written in.
    survey: of the dense model, where a stage asked for one. processes: those that the inputs come from.
    """

    def __init__(
        self,
        decoder: Decoder,
        stages: Sequence[Stage],
        layout: Layout,
        survey: Survey | None,
        clock: Stopwatch,
        processes: Processes = ALONE,
    ) -> None:
        self.decoder = decoder
        self.layout = layout
        self.stages = [stage for stage in stages if stage.site is LinearSite]
        self.survey = survey
        self.clock = clock
        self.processes = processes

    def rewrite_group(self, group: Readers | Writers) -> list[Report]:
        """Rewrite the linears of a group that has been written, by the inputs that it was fitted to.

        Readers beside experts are left to `rewrite_readers`: the group's inputs are all tokens'.
        """
        apart = isinstance(group, Readers) and group.branch.experts
        if not self.stages or group.block == len(self.decoder.blocks) or apart:
            return []
        sharing, reports = dict[tuple[int, int], list[str]](), []
        for name, place in group.places().items():
            sharing.setdefault((place.start, place.stop), []).append(name)
        for where, names in sharing.items():
            form = self.layout.form(group.branch, names[0])
            given = SharedInputs(group.moments(slice(*where)), form, group.tokens)
            reports += self.rewrite(group.branch, group.block, names, given)
        return reports

    def rewrite_together(self, branch: Branch, block: int, streams: Streams, *, advance: bool) -> list[Report]:
        """Rewrite the linears by their inputs in one pass of the unchanged branch.

        advance: the stream goes on behind that pass, and sees nothing of what is rewritten.
        """
        return self._rewrite(branch, block, streams, branch.sharing(), advance=advance)

    def rewrite_readers(self, branch: Branch, block: int, streams: Streams) -> list[Report]:
        """Rewrite the readers alone, by their inputs in one pass of the unchanged branch."""
        sharing = [names for names in branch.sharing() if names[0] in branch.readers]
        return self._rewrite(branch, block, streams, sharing, advance=False) if self.stages else []

    def _rewrite(
        self, branch: Branch, block: int, streams: Streams, sharing: list[tuple[str, ...]], *, advance: bool
    ) -> list[Report]:
        firsts = [plain(branch.linear(names[0])) for names in sharing]
        sums = [EquationSums(linear.in_features, 0, self.decoder.device) for linear in firsts]
        for batch in streams.batches:
            stream, _ = streams.now(batch)
            with self.clock("forward"), captured_inputs(firsts) as given:
                update = streams.update(branch, stream, batch, block)
                if advance:
                    streams.compressed.put(batch.index, stream + update)
            with self.clock("statistics"):
                for place, inputs in given.items():
                    sums[place].add(rows(inputs), None)
        reports, every = [], None
        for names, its_sums in zip(sharing, sums, strict=True):
            shared = self._shared_inputs(branch, names[0], its_sums, every)
            every = every or shared.inputs
            reports += self.rewrite(branch, block, names, shared)
        return reports

    def _shared_inputs(self, branch: Branch, name: str, sums: EquationSums, every: InputMoments | None) -> SharedInputs:
        """
        every: what all tokens give to what reads the stream. The first linears of a branch are no expert's.
        """
        form, tokens = self.layout.form(branch, name), None
        with self.clock("statistics"):
            if name in branch.expert_linears:
                given = regularized(sums, self.processes, every if name in branch.readers else None)
                moments, tokens = given.moments(), given.tokens
            else:
                moments = sums.moments(self.processes)
        return SharedInputs(moments, form, tokens)

    def rewrite(self, branch: Branch, block: int, names: Sequence[str], given: SharedInputs) -> list[Report]:
        sites = [self._site(branch, block, name, given) for name in names]
        with self.clock("solve"):
            for stage in self.stages:
                if stage.in_written_form:
                    sites = [
                        self._in_written_form(branch, name, site, given.written)
                        for name, site in zip(names, sites, strict=True)
                    ]
                stage.apply_together(sites)
            for site in sites:
                self.processes.follow(*site.module.state_dict().values())
        return [site.report() for site in sites]

    def _site(self, branch: Branch, block: int, name: str, given: SharedInputs) -> LinearSite:
        decoder, survey, module = self.decoder, self.survey, plain(branch.linear(name))
        shape = linear_shape(f"{decoder.block_prefix(block)}{name}", name, decoder.family.part_of(name), module)
        return LinearSite(
            name=f"block {block} {name}",
            shape=shape,
            module=module,
            inputs=given.inputs,
            put=lambda put: branch.replace_linear(name, put),
            read_gradient=no_gradient
            if survey is None
            else partial(survey.gradient_at, shape.path, block, decoder.device),
            notes={} if given.tokens is None else {"tokens": given.tokens, "wanted": module.in_features},
        )

    def _in_written_form(self, branch: Branch, name: str, site: LinearSite, inputs: InputMoments) -> LinearSite:
        """Bring a linear into the checkpoint's form; the walk goes on with it through a change of form."""
        form = self.layout.form(branch, name)
        if form.is_identity:
            return site
        width = branch.in_features(name)
        assert isinstance(site.module, AnyLinear)
        module = in_form(site.module, form)

        def put(linear: Rewritten) -> None:
            branch.replace_linear(name, Written(linear, form, width))

        put(module)
        shape = replace(site.shape, m=module.out_features, n=module.in_features, has_bias=has_bias(module))
        return replace(site, shape=shape, module=module, inputs=inputs, put=put, read_gradient=no_gradient)


def has_bias(module: AnyLinear) -> bool:
    last: nn.Linear = module if isinstance(module, nn.Linear) else module.second
    return last.bias is not None


def plain(module: nn.Module) -> nn.Linear:
    """Assert that a linear is still a plain one."""
    assert isinstance(module, nn.Linear)
    return module
