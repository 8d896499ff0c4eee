"""The synchronous engine: requests are added and cancelled between steps; a step moves them on by one target forward.

R requests, K draft slots, B rows with logits, V vocabulary, k taps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dspark.common.sampling_params import SamplingParams
from dspark.drafters.base import Draft, DraftContext, Drafter
from dspark.drafters.ngram import NoDraft
from dspark.engine.admission import Admission, Schedule
from dspark.engine.assemble import assemble, committed_rows, page_table
from dspark.engine.config import WORTH_COMPILING, EngineConfig
from dspark.engine.intake import Intake
from dspark.engine.judging import judge
from dspark.engine.laws import Laws, padded
from dspark.engine.logprobs import log_probabilities, score_prompts
from dspark.engine.planning import Planning, records, step_load
from dspark.engine.prefix import PagePool
from dspark.engine.request import Commit, Request
from dspark.engine.runner import Runner, Timings
from dspark.engine.trace import trace_of
from dspark.models.target import Target
from dspark.speculation.cost import StepTime
from dspark.speculation.draft_sampler import DraftSampler
from dspark.speculation.grammar import Guide
from dspark.speculation.noise import RoundNoise
from dspark.speculation.planner import Planner, parse_planner
from dspark.speculation.reliability import Observer
from dspark.speculation.statistics import SpeculationStatistics
from dspark.speculation.verify import NoNumbers, Verdict

HEADROOM = 2  # slots a drafter may read past its block


class RequestsFailed(FloatingPointError):
    """A step in which the target gave no numbers for some requests. It committed nothing; the others lost nothing."""

    def __init__(self, request_ids: Sequence[int], why: Exception):
        super().__init__(str(why))
        self.request_ids = list(request_ids)


class EngineCore:
    """Continuous batching with speculation. Not thread-safe: one caller adds, steps and cancels."""

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None = None,
        planner: str | Planner = "full",
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        config: EngineConfig | None = None,
        eos_token_ids: Iterable[int] = (),
        observer: Observer | None = None,
        meter: Callable[[StepTime], None] | None = None,
    ):
        """Text prompts, texts and stop strings need a tokenizer; token ids do without.

        `observer` gets what became of every round's draft, `meter` what every step did and took.
        """
        self.config = config = config or EngineConfig()
        self.target, self.tokenizer = target, tokenizer
        self.drafter = drafter = drafter or NoDraft(target.vocab_size)
        self.planning = Planning(parse_planner(planner) if isinstance(planner, str) else planner, seed=config.seed)
        self.observer, self.meter = observer, meter
        block = drafter.block_size if config.max_draft is None else min(drafter.block_size, config.max_draft)
        pages = config.pages_for(target)
        pool = PagePool(pages, config.page_size, remember=config.prefix_caching)
        self.admission = Admission(pool, config, block_size=block)
        self.runner = Runner(target, drafter, pages=pages, page_size=config.page_size)
        self.laws = Laws(target.vocab_size, target.device)
        self.intake = Intake(
            target,
            tokenizer,
            config,
            capacity=pool.capacity,
            eos_token_ids=eos_token_ids,
            headroom=block + HEADROOM,
        )
        self.requests: dict[int, Request] = {}
        self.statistics = SpeculationStatistics()  # of all requests that have left
        self.once_compiled: Callable[[], object] | None = None  # called by `wait_compiled` when it has waited
        self.metering = math.inf  # share of the time that the meter may take; below it, some steps go unmetered
        self._next_metering = 0.0  # s of steps until the meter is asked again
        large = sum(p.numel() for p in target.model.state_dict().values()) >= WORTH_COMPILING
        self.graphs = self.runner.compile() if config.compile and large else []

    @property
    def planner(self) -> Planner:
        """Who decides how many tokens are drafted and verified."""
        return self.planning.planner

    @property
    def timings(self) -> Timings:
        """Time by phase since the engine was made."""
        return self.runner.timings

    def wait_compiled(self, tick: Callable[[float], None] | None = None) -> bool:
        """Block until the forwards are compiled, as a benchmark wants; whether they now are. `tick` gets seconds."""
        for graph in self.graphs:
            graph.wait(tick)
        once, self.once_compiled = self.once_compiled, None
        if once is not None:
            once()
        return all(graph.status == "compiled" for graph in self.graphs)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.requests

    def add(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> int:
        """Queue a request and return its id. Raises UserError for one that could never be served."""
        request = self.intake.request(prompt, params or SamplingParams())
        self.requests[request.id] = request
        self.admission.waiting.append(request)
        return request.id

    def cancel(self, request_id: int) -> Commit | None:
        """Free everything a request holds; None if it is not here (any more)."""
        request = self.requests.get(request_id)
        if request is None:
            return None
        request.finish_reason = "cancelled"
        request.statistics.finished = time.perf_counter()
        self._leave(request)
        return Commit(request_id, [], "", 0, None, "cancelled", request.statistics)

    def step(self) -> list[Commit]:
        """Propose, plan, assemble, forward, verify, commit; returns what was committed to whom."""
        started = self.runner.clock()
        schedule = self.admission.schedule()
        if not (schedule.sampled or schedule.partial):
            return []
        noise, draft, guide = self._propose(schedule)
        drafted = self.runner.clock()
        plan = self.planning.plan(schedule, draft)
        batch = assemble(schedule, draft, plan, page_size=self.config.page_size, device=self.target.device)
        logits_BV, taps_TkD = self.runner.forward(batch)
        if batch.scored:
            score_prompts(schedule, logits_BV[-batch.scored :])
            logits_BV = logits_BV[: -batch.scored]
        verdict = self._judge(schedule, draft, plan, noise, logits_BV, guide)
        kept = committed_rows(schedule.rows, verdict.plan, verdict.accepted_R, len(batch.batch.token_T))
        self.runner.extend(batch.batch, taps_TkD, kept, drafting=draft is not None)
        if self.observer is not None and draft is not None:
            self.observer(records(schedule, draft, verdict))
        metered = self.meter is not None and self._next_metering <= 0.0
        load = step_load(schedule, draft, batch) if metered else None
        commits = self._commit(schedule, draft, verdict, logits_BV)
        seconds = self.runner.clock() - started
        self.planning.observe(schedule, verdict, seconds)
        self.timings.steps += 1
        self.timings.total += seconds
        self._next_metering -= seconds
        if self.meter is not None and load is not None:
            before = time.perf_counter()
            committed = sum(len(commit.token_ids) for commit in commits)
            self.meter(StepTime(**load, draft_seconds=drafted - started, seconds=seconds, committed=committed))
            self._next_metering = (time.perf_counter() - before) / self.metering
        return commits

    def abandon(self, failed: Sequence[int] | None = None) -> list[int]:
        """After a step that raised: cancel the requests `failed`, or else all that were running; return their ids.

        Everybody else waits and goes on where they were. What the step left in the pages may be no numbers, and
        attention reads the unused end of a page before it masks it: all pages, which nobody holds any more, are made
        anew. Raises what the device raises if it is gone.
        """
        ids = [request.id for request in self.admission.running] if failed is None else list(failed)
        for request_id in ids:
            self.cancel(request_id)
        self.admission.preempt_all()
        self.forget_prefixes()
        self.check_integrity()
        self.runner.clear()
        return ids

    def forget_prefixes(self) -> None:
        """Empty the prefix cache, as after a change of weights."""
        self.admission.pool.forget_all()

    def check_integrity(self) -> None:
        """Raises AssertionError where pages leak or requests are lost."""
        self.admission.check_integrity()
        known = {request.id for request in [*self.admission.running, *self.admission.waiting]}
        assert known == set(self.requests), "requests known and requests queued differ"

    def _propose(self, schedule: Schedule) -> tuple[RoundNoise | None, Draft | None, Guide | None]:
        """The round's noise, drafts of the requests that may and shall have one, put first in `schedule`, grammars."""
        if not schedule.sampled:
            return None, None, None
        slots = self.planning.slots(schedule)
        noise, guide = self.laws.noise(schedule.sampled, slots), self.laws.guide(schedule.sampled)
        if not slots:
            return noise, None, guide
        drafting = [request for request, limit in zip(schedule.sampled, schedule.limits, strict=True) if limit]
        everyone = len(drafting) == len(schedule.sampled)
        own_noise = noise if everyone else noise.select(range(len(drafting)))
        sampler = DraftSampler(self.laws.group(drafting).shaping, own_noise, self.laws.history(drafting), guide)
        anchors, positions = [request.tokens[-1] for request in drafting], [request.cached for request in drafting]
        reach = max(positions) + slots + HEADROOM
        device = self.target.device
        ahead_2R = torch.from_numpy(np.array((anchors, positions))).to(device)
        context = DraftContext(
            anchor_R=ahead_2R[0],
            position_R=ahead_2R[1],
            page_table_RP=torch.from_numpy(page_table(drafting, reach, self.config.page_size)).to(device),
            slots=slots,
            request_ids=[request.id for request in drafting],
            history=[request.tokens for request in drafting],
            sampler=sampler,
            draws=sampler.draws,
            rules=guide,
            wanted=self.planning.reads_confidence
            or self.observer is not None
            or any(request.params.trace for request in drafting),
            going_on=self.planning.going_on(len(drafting)),
        )
        draft = padded(self.runner.propose(context), len(schedule.sampled))
        return noise, draft if guide is None else guide.follow(draft), guide

    def _judge(
        self,
        schedule: Schedule,
        draft: Draft | None,
        plan: list[int],
        noise: RoundNoise | None,
        logits_BV: Tensor,
        guide: Guide | None,
    ) -> Verdict:
        if noise is None:
            return Verdict([], [], [])
        try:
            return judge(schedule.sampled, self.laws, draft, plan, noise, logits_BV, guide)
        except NoNumbers as error:
            raise RequestsFailed([schedule.sampled[place].id for place in error.places], error) from error

    def _commit(self, schedule: Schedule, draft: Draft | None, verdict: Verdict, logits_BV: Tensor) -> list[Commit]:
        """Requests take their tokens, full pages become findable, finished requests leave."""
        commits = []
        for index, request in enumerate(schedule.sampled):
            plan, accepted = verdict.plan[index], verdict.accepted_R[index]
            kept, texts = request.commit(verdict.tokens[index])
            request.rounds += 1
            drafted = draft.length_R[index] if draft is not None else 0
            if request.decoding:
                request.statistics.observe(drafted=drafted, verified=plan, accepted=accepted, committed=len(kept))
            request.decoding = True
            cached = request.cached + schedule.rows[index] + accepted
            self.admission.keep(request, min(cached, len(request.tokens)))
            traced = request.params.trace
            commits.append(
                Commit(
                    request.id,
                    kept,
                    "".join(texts),
                    min(accepted, len(kept)),
                    None,
                    request.finish_reason,
                    request.statistics,
                    trace_of(kept, texts, draft=draft, verdict=verdict, row=index) if traced else None,
                    request.trouble,
                    drafted,
                    plan,
                    request.scores,
                )
            )
            request.scores = None
            if request.finish_reason:
                self._leave(request)
        for request, rows in schedule.partial:
            self.admission.keep(request, request.cached + rows)
        return log_probabilities(schedule.sampled, commits, verdict.plan, logits_BV)

    def _leave(self, request: Request) -> None:
        self.admission.remove(request)
        self.statistics.merge(request.statistics)
        del self.requests[request.id]
