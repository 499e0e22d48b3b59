"""A thousand replicas and the ways to route requests to them, without a tensor or a network.

    python -m benchmarks.routing_sim --rates 4.5 6 --plot docs/images/routing.png

Every replica is the real scheduler over real memory accounts with the cost model of
`scheduler_sim`; the prefix-aware router is the one that replicas on Ray have. Prompts begin
with one of many system prompts, a few of them popular (Zipf); every router knows all loads at once.
"""

import argparse
import heapq
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path

from benchmarks.scheduler_sim import Cost, Life, _account, _add, make_scheduler, percentile
from benchmarks.traces import Arrival
from tgis.cluster.affinity import Ring, choose
from tgis.core.scheduler import Scheduler
from tgis.core.sequence import Sequence

SYSTEM_TOKENS = 400


@dataclass(slots=True)
class Request:
    """A request and the system prompt that it begins with."""

    arrival: Arrival
    system: int


def requests(rate: float, number: int, systems: int, seed: int) -> Iterator[Request]:
    """A Poisson stream; the n-th most popular system prompt has a share of 1/n."""
    rng = random.Random(seed)
    popularity = list(accumulate(1 / (rank + 1) for rank in range(systems)))
    now = 0.0
    for index in range(number):
        now += rng.expovariate(rate)
        (system,) = rng.choices(range(systems), cum_weights=popularity)
        start = system << 12
        question = max(1, min(400, round(60 * math.exp(0.6 * rng.gauss(0, 1)))))
        own = (1 << 30) + (index << 12)
        prompt = [*range(start, start + SYSTEM_TOKENS), *range(own, own + question)]
        output = max(1, min(256, round(60 * math.exp(0.6 * rng.gauss(0, 1)))))
        yield Request(Arrival(now, prompt, output, 256), system)


@dataclass
class Replica:
    """One replica: its scheduler, and when the step under way ends."""

    scheduler: Scheduler
    live: dict[int, tuple[Sequence, Life]] = field(default_factory=dict)
    busy: bool = False


@dataclass
class Outcome:
    """What became of all requests under one router."""

    lives: list[Life] = field(default_factory=list)
    peak: int = 0  # most requests in one replica at once
    hit_tokens: int = 0
    num_tokens: int = 0
    seconds: float = 0.0  # of the simulation itself

    def row(self) -> dict[str, str]:
        """Figures for a table, of the requests of the second half."""
        lives = self.lives[len(self.lives) // 2 :]
        first = [life.first - life.arrived for life in lives]
        whole = [life.last - life.arrived for life in lives]
        gaps = [life.longest_gap for life in lives]
        return {
            "first token p50, s": f"{percentile(first, 50):.2f}",
            "first token p99, s": f"{percentile(first, 99):.2f}",
            "whole answer p50, s": f"{percentile(whole, 50):.2f}",
            "whole answer p99, s": f"{percentile(whole, 99):.2f}",
            "longest gap p99, s": f"{percentile(gaps, 99):.3f}",
            "prompt tokens from the cache": f"{self.hit_tokens / self.num_tokens:.0%}",
            "most requests in a replica": str(self.peak),
        }


Router = Callable[[Request, list[int], int], int]
"""(request, requests in each replica, their sum) -> replica."""


def round_robin(num_replicas: int) -> Router:
    """One after the other."""
    turn = iter(range(1 << 62))
    return lambda *_: next(turn) % num_replicas


def two_choices(num_replicas: int) -> Router:
    """The idler one of two at random: what Serve does by itself."""
    rng = random.Random(1)
    return lambda _, loads, __: min(rng.sample(range(num_replicas), 2), key=loads.__getitem__)


def least_loaded(num_replicas: int) -> Router:
    """The idlest of all; among equals any."""
    rng = random.Random(2)

    def route(_: Request, loads: list[int], __: int) -> int:
        least = min(loads)
        start = rng.randrange(num_replicas)
        try:
            return loads.index(least, start)
        except ValueError:
            return loads.index(least)

    return route


def prefix_aware(num_replicas: int) -> Router:
    """The replica of the prompt's beginning, unless it has too much to do."""
    ring = Ring(map(str, range(num_replicas)))
    keys: dict[int, bytes] = {}

    def route(request: Request, loads: list[int], total: int) -> int:
        system = request.system
        if system not in keys:
            keys[system] = blake2b(str(system).encode(), digest_size=8).digest()
        mean = total / num_replicas
        chosen = choose(ring.walk(keys[system]), lambda name: loads[int(name)], mean)
        assert chosen is not None  # one always has no more than the mean
        return int(chosen)

    return route


ROUTERS = {
    "round robin": round_robin,
    "two choices": two_choices,
    "least loaded": least_loaded,
    "prefix-aware": prefix_aware,
}


def simulate(
    router: Router, replicas: list[Replica], arrivals: Iterator[Request], cost: Cost
) -> Outcome:
    """Play all requests to their ends, in the order of time."""
    outcome = Outcome()
    loads, total = [0] * len(replicas), 0
    ends: list[tuple[float, int]] = []  # of steps under way
    began = time.process_time()
    uid = 0
    upcoming = next(arrivals, None)
    while upcoming is not None or ends:
        if upcoming is None or (ends and ends[0][0] <= upcoming.arrival.time):
            now, number = heapq.heappop(ends)
            replica = replicas[number]
            total += len(replica.live) - loads[number]
            loads[number] = len(replica.live)
            _step(replica, number, now, ends, cost)
            continue
        arrival = upcoming.arrival
        number = router(upcoming, loads, total)
        replica = replicas[number]
        seq = Sequence.of(uid, _add(uid, arrival), 0)
        life = Life(arrival.time, seq.num_prompt, arrival.num_output, cost.alone(arrival))
        replica.live[uid] = seq, life
        replica.scheduler.add(seq)
        outcome.lives.append(life)
        outcome.num_tokens += seq.num_prompt
        loads[number] += 1
        total += 1
        outcome.peak = max(outcome.peak, loads[number])
        if not replica.busy:
            _step(replica, number, arrival.time, ends, cost)
        uid += 1
        upcoming = next(arrivals, None)
    outcome.hit_tokens = sum(
        replica.scheduler.drain_counts().prefix_hit_tokens for replica in replicas
    )
    outcome.seconds = time.process_time() - began
    return outcome


def _step(
    replica: Replica, number: int, now: float, ends: list[tuple[float, int]], cost: Cost
) -> None:
    """Begin a step; what it makes is there when it ends, which nobody sees before."""
    replica.busy = bool(replica.live)
    if not replica.busy:
        return
    plan = replica.scheduler.schedule()
    end = now + cost(plan)
    _account(replica.scheduler, plan, replica.live, now, end)
    replica.scheduler.drain_released()
    heapq.heappush(ends, (end, number))


def draw(outcomes: dict[float, dict[str, Outcome]], path: Path) -> None:
    """Times to the first token."""
    from matplotlib import pyplot  # the extra `bench`

    figure, axes = pyplot.subplots(
        1, len(outcomes), figsize=(5 * len(outcomes), 3.5), layout="constrained", squeeze=False
    )
    shares = [percent / 5 for percent in range(501)]
    for (rate, by_router), axis in zip(outcomes.items(), axes[0], strict=True):
        for name, outcome in by_router.items():
            lives = outcome.lives[len(outcome.lives) // 2 :]
            first = [life.first - life.arrived for life in lives]
            axis.plot([percentile(first, percent) for percent in shares], shares, label=name)
        axis.set(xlabel="seconds to the first token", ylabel="percent of requests", xscale="log")
        axis.set_title(f"{rate:g} requests a second for each replica")
        axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", type=int, default=1000)
    parser.add_argument("--rates", type=float, nargs="+", default=[4.5], help="for each replica")
    parser.add_argument("--seconds", type=float, default=40.0, help="of arrivals")
    parser.add_argument("--systems", type=int, default=5000, help="system prompts")
    parser.add_argument("--pool", type=int, default=16_384, help="tokens of keys and values")
    parser.add_argument("--routers", nargs="+", choices=list(ROUTERS), default=list(ROUTERS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    outcomes: dict[float, dict[str, Outcome]] = {}
    for rate in arguments.rates:
        number = round(rate * arguments.replicas * arguments.seconds)
        for name in arguments.routers:
            replicas = [
                Replica(make_scheduler("paged:64", arguments.pool, 64, True))
                for _ in range(arguments.replicas)
            ]
            stream = requests(rate * arguments.replicas, number, arguments.systems, arguments.seed)
            router = ROUTERS[name](arguments.replicas)
            outcomes.setdefault(rate, {})[name] = simulate(router, replicas, stream, Cost())
        columns = {name: outcome.row() for name, outcome in outcomes[rate].items()}
        print(f"\n{rate:g} requests a second for each replica, {number:,} requests\n")
        print("| | " + " | ".join(columns) + " |")
        print("|---" * (len(columns) + 1) + "|")
        for key in next(iter(columns.values())):
            print(f"| {key} | " + " | ".join(column[key] for column in columns.values()) + " |")
        took = sum(outcome.seconds for outcome in outcomes[rate].values())
        print(f"\n{took:.0f} s of CPU time", flush=True)
    if arguments.plot is not None:
        draw(outcomes, arguments.plot)


if __name__ == "__main__":
    main()
