"""Random interleavings of everything that can happen to sequences, checked after every one.

    python -m tests.core.interleavings 1000000

Memory is so small that hits, copies, evictions and preemptions are common. After every event the
accounts must add up, and every generated token must be the one that follows from the sequence's own
tokens.
"""

import argparse
import random
import time
from collections import Counter

from tests.kit.scheduling import Driver, request

from tgis.types import DetailParams

DETAILS = DetailParams(logprobs=True, input=True)
# Beginnings that many prompts share.
STEMS = [[(7 * stem + i) % 32 for i in range(64)] for stem in range(3)]
SALTS = [b"", b"", b"other"]


class Interleavings:
    """One memory, one scheduler, and dice."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.events: Counter[str] = Counter()
        self.now = 0
        self.next_id = 0
        self.driver = Driver.make(
            slots=rng.randint(1, 8),
            tokens=rng.choice([112, 160, 320, 640]),
            budget=rng.choice([9, 24, 64]),
            block_tokens=rng.choice([0, 0, 4, 16]),
            granule=rng.choice([1, 1, 8]),
            caching=rng.random() < 0.9,
            horizon=rng.choice([0, 16, 64]),
        )

    def event(self) -> None:
        """Let one thing happen."""
        driver, rng = self.driver, self.rng
        dice = rng.random()
        if dice < 0.62 or not driver.live:
            if driver.scheduler.has_work and dice > 0.1:
                self.step()
            elif len(driver.live) < 12:
                self.add()
        elif dice < 0.82 and len(driver.live) < 12:
            self.add()
        elif dice < 0.92:
            driver.drop(rng.choice(list(driver.live)))
            self.events["cancelled"] += 1
        elif dice < 0.95:
            driver.drop(rng.choice(list(driver.live)), keep=False)
            self.events["failed alone"] += 1
        elif dice < 0.98:
            driver.expire()
            driver.check()
            self.events["expired"] += 1
        else:
            driver.fail()
            self.events["failed with its step"] += 1

    def step(self) -> None:
        """Compute; what happened inside shows in the plan and the counts."""
        plan = self.driver.step()
        counts = self.driver.scheduler.drain_counts()
        self.events["steps"] += 1
        self.events["copies"] += len(plan.copies)
        self.events["hits"] += counts.prefix_hit_tokens > 0
        self.events["preemptions"] += counts.num_preempted
        self.events["queue jumps"] += counts.num_queue_jumps

    def add(self) -> None:
        """A prompt that begins like others, or like nothing else; never more than fits."""
        rng, uid = self.rng, self.next_id
        stem = rng.choice(STEMS)[: rng.choice([0, 40, 64, 64, 64])]
        tail = [rng.randrange(32) for _ in range(rng.randint(1, 24))]
        add = request(
            uid,
            prompt=stem + tail,
            max_new=rng.randint(1, 16),
            arrival=self.driver.now,
            deadline=self.driver.now + rng.choice([4.0, 50.0, 1e9, 1e9]),
            details=DETAILS if rng.random() < 0.1 else DetailParams(),
        )
        self.next_id += 1
        self.driver.add(add, rng.choice(SALTS))
        self.events["added"] += 1

    def finish(self) -> None:
        """With nothing more to come, everything ends and nothing stays behind."""
        while self.driver.scheduler.has_work:
            self.step()
        assert self.driver.memory.used == 0
        assert not self.driver.live


def run(num_events: int, seed: int, per_world: int = 1000) -> Counter[str]:
    """Play `num_events` events, in a new world after every `per_world`."""
    events: Counter[str] = Counter()
    for world in range(-(-num_events // per_world)):
        game = Interleavings(seed * 1_000_003 + world)
        try:
            for _ in range(per_world):
                game.event()
            game.finish()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, world {world}: {error}") from error
        events += game.events
    return events


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("events", type=int, nargs="?", default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.perf_counter()
    events = run(arguments.events, arguments.seed)
    print(f"{arguments.events} events in {time.perf_counter() - start:.0f} s, nothing lost:")
    for name, number in events.most_common():
        print(f"{number:10d} {name}")


if __name__ == "__main__":
    main()
