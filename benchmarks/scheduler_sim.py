"""The real scheduler, memory and budgets against a cost model: no tensors, no waiting.

    python -m benchmarks.scheduler_sim --trace chat --rate 6 --policies paged:64 paged:inf padded
    python -m benchmarks.scheduler_sim --speed

Compares policies on the same trace: how long requests queue, how fair that is, how well the memory
is used, how much of the work is padding or is done twice. `--plot FILE` draws each run (needs the
extra `bench`). `--speed` measures the scheduler itself.

A policy is `paged:H`, chunked prefill with H steps of looking ahead (`inf`: TGIS's admission by all
that requests may generate) over rows of memory; `blocks:H`, the same over blocks; or `padded`,
TGIS's padded batches with its default limits.
"""

import argparse
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.traces import KINDS, Arrival, trace
from tgis.core.budget import Budget, PaddedBudget, PaddedModel, PagedBudget
from tgis.core.kv.base import KvMemory
from tgis.core.kv.blocks import BlocksMemory
from tgis.core.kv.rows import RowsMemory
from tgis.core.scheduler import Scheduler
from tgis.core.sequence import Sequence
from tgis.engines.plan import StepPlan
from tgis.types import NO_DETAILS, FinishReason, SamplingParams
from tgis.wire import Add

EOS = -1
_GREEDY = SamplingParams()


@dataclass(frozen=True)
class Cost:
    """Seconds of a step; the defaults are about those of shape M on two cores."""

    step: float = 0.008
    prompt_token: float = 0.00025
    decode_row: float = 0.0006
    context_token: float = 4e-7  # of a decoding sequence
    padded: bool = False

    def __call__(self, plan: StepPlan) -> float:
        decode = [row.start for row in plan.rows if len(row.token_ids) == 1]
        prompts = [len(row.token_ids) for row in plan.rows if len(row.token_ids) > 1]
        context, tokens = sum(decode), sum(prompts)
        if self.padded:
            context = len(decode) * max(decode, default=0)
            tokens = len(prompts) * max(prompts, default=0)
        work = tokens * self.prompt_token + len(decode) * self.decode_row
        return self.step + work + context * self.context_token

    def alone(self, arrival: Arrival) -> float:
        """Seconds that a request takes on an idle machine."""
        prompt, outputs = len(arrival.prompt), arrival.num_output
        context = outputs * (prompt + outputs / 2)
        steps = outputs * (self.step + self.decode_row)
        return prompt * self.prompt_token + steps + context * self.context_token


@dataclass(slots=True)
class Life:
    """What became of one request."""

    arrived: float
    num_prompt: int
    num_output: int
    alone: float  # seconds that it would have taken on an idle machine
    started: float = -1.0
    first: float = -1.0
    last: float = -1.0
    longest_gap: float = 0.0


@dataclass
class Report:
    """What became of a trace under one policy."""

    lives: list[Life] = field(default_factory=list)
    samples: list[tuple[float, int, int, float]] = field(default_factory=list)
    num_steps: int = 0
    num_preempted: int = 0
    computed_tokens: int = 0
    padding_tokens: int = 0
    hit_tokens: int = 0
    cpu_seconds: float = 0.0
    cost: Cost = field(default_factory=Cost)

    def rows(self) -> dict[str, str]:
        """Figures for a table."""
        lives = self.lives
        queue = [life.started - life.arrived for life in lives]
        first = [life.first - life.arrived for life in lives]
        gaps = [life.longest_gap for life in lives]
        speed = [life.alone / (life.last - life.arrived) for life in lives]
        outputs = sum(life.num_output for life in lives)
        needed = sum(life.num_prompt + life.num_output - 1 for life in lives)
        again = self.computed_tokens + self.hit_tokens - needed
        span = max(life.last for life in lives)
        return {
            "tokens/s": f"{outputs / span:.0f}",
            **{f"queue p{p} s": f"{percentile(queue, p):.2f}" for p in (50, 99, 100)},
            **{f"ttft p{p} s": f"{percentile(first, p):.2f}" for p in (50, 99)},
            "longest gap p99 s": f"{percentile(gaps, 99):.3f}",
            "fairness": f"{jain(speed):.3f}",
            "mean pool": f"{statistics.fmean(use for *_, use in self.samples):.0%}",
            "preempted": f"{self.num_preempted / len(lives):.2%}",
            "recomputed": f"{max(again, 0) / needed:.2%}",
            "padding": f"{self.padding_tokens / (self.computed_tokens + self.padding_tokens):.1%}",
            "cached": f"{self.hit_tokens / needed:.1%}",
            "requests/s of CPU time": f"{len(lives) / self.cpu_seconds:.0f}",
        }


def percentile(values: list[float], percent: float) -> float:
    """The nearest rank."""
    values.sort()
    return values[min(len(values) - 1, int(len(values) * percent / 100))]


def jain(values: list[float]) -> float:
    """Jain's index of fairness: 1 = all alike, 1/n = one gets everything."""
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values))


def simulate(scheduler: Scheduler, arrivals: Iterator[Arrival], cost: Cost) -> Report:
    """Play a trace to its end."""
    report = Report(cost=cost)
    live: dict[int, tuple[Sequence, Life]] = {}
    now, uid = 0.0, 0
    upcoming = next(arrivals, None)
    cpu = time.process_time()
    while upcoming is not None or live:
        if not live and upcoming is not None:
            now = max(now, upcoming.time)
        while upcoming is not None and upcoming.time <= now:
            seq = Sequence.of(uid, _add(uid, upcoming), 0)
            life = Life(upcoming.time, seq.num_prompt, upcoming.num_output, cost.alone(upcoming))
            live[uid] = seq, life
            report.lives.append(life)
            scheduler.add(seq)
            uid += 1
            upcoming = next(arrivals, None)
        plan = scheduler.schedule()
        before, now = now, now + cost(plan)
        _account(scheduler, plan, live, before, now)
        scheduler.drain_released()
        _sample(report, scheduler, plan, now)
    report.cpu_seconds = time.process_time() - cpu
    counts = scheduler.drain_counts()
    report.num_preempted, report.hit_tokens = counts.num_preempted, counts.prefix_hit_tokens
    fault = scheduler.check()
    if fault is not None:
        raise RuntimeError(fault)
    return report


def _add(uid: int, arrival: Arrival) -> Add:
    return Add(
        uid,
        arrival.prompt,
        _GREEDY,
        NO_DETAILS,
        max(arrival.max_new_tokens, arrival.num_output),
        math.inf,
        arrival.time,
    )


def _account(
    scheduler: Scheduler,
    plan: StepPlan,
    live: dict[int, tuple[Sequence, Life]],
    before: float,
    now: float,
) -> None:
    for row in plan.rows:
        seq, life = live[row.seq_id]
        scheduler.account(seq, row)
        if life.started < 0:
            life.started = before
        if seq.num_computed < len(seq.token_ids):
            continue
        if life.first < 0:
            life.first = now
        elif now - life.last > life.longest_gap:
            life.longest_gap = now - life.last
        life.last = now
        num_generated = len(seq.token_ids) - seq.num_prompt + 1
        token = EOS if num_generated >= life.num_output else num_generated
        if scheduler.append(seq, token, now) is not FinishReason.NOT_FINISHED:
            del live[row.seq_id]


def _sample(report: Report, scheduler: Scheduler, plan: StepPlan, now: float) -> None:
    prompts = [len(row.token_ids) for row in plan.rows if len(row.token_ids) > 1]
    report.num_steps += 1
    report.computed_tokens += sum(prompts) + len(plan.rows) - len(prompts)
    if report.cost.padded and prompts:
        report.padding_tokens += max(prompts) * len(prompts) - sum(prompts)
    if report.num_steps % 64 == 0:
        gauges = scheduler.gauges()
        use = gauges.kv_tokens_used / gauges.kv_tokens_total
        report.samples.append((now, gauges.num_running, gauges.num_waiting, use))


def make_scheduler(policy: str, pool: int, max_running: int, caching: bool) -> Scheduler:
    """A scheduler by the name of a policy."""
    budget: Budget
    memory: KvMemory
    max_step_tokens = max(512, 2 * max_running)
    if policy == "padded":
        max_running = 12
        max_step_tokens = max_running * 4096
        model = PaddedModel.tokens(pool, 2048)
        memory = RowsMemory(max_running, max_running * 4096, caching=False)
        budget = PaddedBudget(model)
    else:
        layout, _, horizon = policy.partition(":")
        memory = (
            BlocksMemory(max_running, pool // 16, 16, caching=caching)
            if layout == "blocks"
            else RowsMemory(2 * max_running, pool, granule=32, caching=caching)
        )
        budget = PagedBudget(memory.total, horizon=float(horizon))
    return Scheduler(
        memory,
        budget,
        max_step_tokens=max_step_tokens,
        max_running=max_running,
        eos_token_ids=[EOS],
    )


def measure_steps(num_running: int) -> float:
    """Seconds of schedule() and account() per step, all sequences decoding."""
    scheduler = make_scheduler("paged:64", num_running * 512, num_running, True)
    seqs = {}
    for uid in range(num_running):
        arrival = Arrival(0.0, list(range(uid << 12, (uid << 12) + 64)), 400, 400)
        seqs[uid] = Sequence.of(uid, _add(uid, arrival), 0)
        scheduler.add(seqs[uid])

    def step() -> float:
        start = time.process_time()
        plan = scheduler.schedule()
        for row in plan.rows:
            seq = seqs[row.seq_id]
            scheduler.account(seq, row)
            if seq.num_computed == len(seq.token_ids):
                scheduler.append(seq, 7, 0.0)
        return time.process_time() - start

    while min(seq.num_generated for seq in seqs.values()) < 2:
        step()
    return statistics.median(step() for _ in range(200))


def print_speed() -> None:
    """The targets: 1.5 ms at 256 running; 20,000 requests a second at batch 64."""
    print("| running | schedule + account, ms per step | µs per sequence |\n|---|---|---|")
    for num_running in (16, 64, 128, 256, 512):
        seconds = min(measure_steps(num_running) for _ in range(3))
        print(f"| {num_running} | {seconds * 1e3:.3f} | {seconds * 1e6 / num_running:.2f} |")
    for caching in (False, True):
        arrivals = list(trace("short", 100_000, 1e9, 64, seed=0))
        scheduler = make_scheduler("paged:64", 64 * 512, 64, caching)
        report = simulate(scheduler, iter(arrivals), Cost())
        rate = len(report.lives) / report.cpu_seconds
        print(
            f"\nbatch 64, {len(report.lives)} short requests, prefix caching {caching}: "
            f"{rate:.0f} requests/s, {report.computed_tokens / report.cpu_seconds:.0f} tokens/s"
        )


def print_table(reports: dict[str, Report]) -> None:
    """One column per policy, as Markdown."""
    columns = {name: report.rows() for name, report in reports.items()}
    print("| | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for key in next(iter(columns.values())):
        print(f"| {key} | " + " | ".join(column[key] for column in columns.values()) + " |")


def draw(reports: dict[str, Report], path: Path) -> None:
    """Queueing times, batch and queue, and use of the pool over time."""
    from matplotlib import pyplot  # the extra `bench`

    figure, (cdf, batch, pool) = pyplot.subplots(3, 1, figsize=(7, 8), layout="constrained")
    for name, report in reports.items():
        queue = [life.started - life.arrived for life in report.lives]
        shares = [percent / 5 for percent in range(501)]
        cdf.plot([percentile(queue, percent) for percent in shares], shares, label=name)
        samples = report.samples[:: -(-len(report.samples) // 200)]
        times = [now for now, *_ in samples]
        (line,) = batch.plot(times, [running for _, running, _, _ in samples], label=name)
        batch.plot(times, [waiting for _, _, waiting, _ in samples], ":", color=line.get_color())
        pool.plot(times, [use for *_, use in samples], label=name)
    cdf.set(xlabel="seconds in the queue", ylabel="percent of requests", xscale="symlog")
    batch.set(xlabel="seconds", ylabel="running (waiting: dotted)", yscale="symlog")
    pool.set(xlabel="seconds", ylabel="share of the pool in use")
    for axes in (cdf, batch, pool):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", choices=sorted(KINDS), default="chat")
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--rate", type=float, default=5.0, help="requests a second")
    parser.add_argument("--burst", type=int, default=1, help="requests that come at once")
    parser.add_argument("--policies", nargs="+", default=["paged:64", "paged:inf", "padded"])
    parser.add_argument("--pool", type=int, default=16_384, help="tokens of keys and values")
    parser.add_argument("--max-running", type=int, default=64)
    parser.add_argument("--no-prefix-caching", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--speed", action="store_true", help="measure the scheduler itself")
    arguments = parser.parse_args()
    if arguments.speed:
        print_speed()
        return
    reports = {}
    for policy in arguments.policies:
        scheduler = make_scheduler(
            policy, arguments.pool, arguments.max_running, not arguments.no_prefix_caching
        )
        arrivals = trace(
            arguments.trace, arguments.requests, arguments.rate, arguments.burst, arguments.seed
        )
        cost = Cost(padded=policy == "padded")
        reports[policy] = simulate(scheduler, arrivals, cost)
    print_table(reports)
    if arguments.plot is not None:
        draw(reports, arguments.plot)


if __name__ == "__main__":
    main()
