"""Ranks that are started elsewhere find their leader; others are turned away."""

import socket
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from tests.kit.server import free_ports

from tgis.config import Config
from tgis.control import Channel
from tgis.engines import rendezvous
from tgis.engines.rank_process import num_ranks_here
from tgis.engines.rank_wire import Connect, Hello, ToLeader, ToRank
from tgis.errors import ConfigError, StartupError
from tgis.types import ModelFiles, ModelKind

WAIT = 20.0
OWN = Hello(0, 3, "1.0", "digest", "float32")


def settings(**values: Any) -> Config:
    return Config(**{"world_size": 3, "num_shard": 3, "master_addr": "127.0.0.2", **values})


@pytest.fixture
def config() -> Config:
    return settings(master_port=free_ports(1)[0] - 1)


class Leader(threading.Thread):
    """Admits in the background."""

    def __init__(self, config: Config) -> None:
        super().__init__(daemon=True)
        self._server = rendezvous.listen(config)
        self.ranks: dict[int, Channel[ToLeader]] = {}

    def run(self) -> None:
        with self._server as server:
            self.ranks = rendezvous.admit(server, OWN, 5.0)

    def close(self) -> None:
        self.join(WAIT)
        for channel in self.ranks.values():
            channel.sock.close()


@pytest.fixture
def leader(config: Config) -> Iterator[Leader]:
    leader = Leader(config)
    leader.start()
    yield leader
    leader.close()


def join_both(config: Config) -> list[Channel[ToRank]]:
    joined: list[Channel[ToRank]] = []
    threads = [
        threading.Thread(
            target=lambda rank=rank: joined.append(
                rendezvous.join(config, msgspec.structs.replace(OWN, rank=rank))
            )
        )
        for rank in (2, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    return joined


def close(channels: list[Channel[ToRank]]) -> None:
    for channel in channels:
        channel.sock.close()


def test_all_ranks_join(config: Config, leader: Leader) -> None:
    joined = join_both(config)
    leader.join(WAIT)
    assert sorted(leader.ranks) == [1, 2]
    assert {channel.sock.getpeername()[0] for channel in joined} == {"127.0.0.2"}
    close(joined)


def test_ranks_wait_for_their_leader(config: Config) -> None:
    joined: list[Channel[ToRank]] = []
    early = threading.Thread(target=lambda: joined.extend(join_both(config)))
    early.start()
    leader = Leader(config)
    leader.start()
    early.join(WAIT)
    assert len(joined) == 2
    leader.close()
    close(joined)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"world_size": 4}, "its world_size is 4, the leader's is 3"),
        ({"version": "0.9"}, "its version is 0.9, the leader's is 1.0"),
        ({"model": "other"}, "its config.json of the model is other, the leader's is digest"),
        ({"dtype": "bfloat16"}, "its dtype is bfloat16, the leader's is float32"),
        ({"rank": 3}, "rank 3 is not between 1 and 2"),
        ({"rank": 0}, "rank 0 is not between 1 and 2"),
    ],
)
def test_a_rank_of_another_group_is_told_why(
    config: Config, leader: Leader, changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(StartupError, match=text):
        rendezvous.join(config, msgspec.structs.replace(OWN, **{"rank": 1, **changes}))
    close(join_both(config))


def test_a_rank_is_admitted_once(config: Config, leader: Leader) -> None:
    address = (config.master_addr, config.master_port + 1)
    with socket.create_connection(address, WAIT) as first:
        Channel[ToRank](first, ToRank).send(msgspec.structs.replace(OWN, rank=1))
        with pytest.raises(StartupError, match="there is a rank 1 already"):
            rendezvous.join(config, msgspec.structs.replace(OWN, rank=1))
        close([rendezvous.join(config, msgspec.structs.replace(OWN, rank=2))])


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 100, b"", b"\x02\0\0\0\xc0\xc0"]
)
def test_what_is_no_rank_is_turned_away(config: Config, leader: Leader, data: bytes) -> None:
    with socket.create_connection((config.master_addr, config.master_port + 1), WAIT) as stranger:
        stranger.sendall(data)
        stranger.shutdown(socket.SHUT_WR)
        assert stranger.recv(100) == b""
    close(join_both(config))


def test_a_port_that_is_taken(config: Config) -> None:
    with (
        rendezvous.listen(config),
        pytest.raises(ConfigError, match=r"MASTER_ADDR = 127.0.0.2: .*"),
    ):
        rendezvous.listen(config)
    with pytest.raises(ConfigError, match="cannot meet there at port"):
        rendezvous.listen(settings(master_addr="203.0.113.1"))


@pytest.mark.parametrize("asked", [True, False])
def test_the_store(asked: bool) -> None:
    (port,) = free_ports(1)
    origins = {"master_port": "--master-port"} if asked else {}
    config = Config(master_addr="127.0.0.2", master_port=port, num_shard=2, origins=origins)
    store, connect, address = rendezvous.open_store(config)
    assert address == connect.host == "127.0.0.2"
    assert (connect.port == port) is asked
    theirs, their_address = rendezvous.meet(connect)
    assert their_address == "127.0.0.1"
    theirs.set("key", "value")
    assert store.get("key") == b"value"
    assert isinstance(connect, Connect)


def test_what_must_be_equal() -> None:
    files = ModelFiles(
        name="m",
        path="/m",
        model_type="llama",
        kind=ModelKind(0),
        weights=(),
        config={"a": 1, "b": 2},
    )
    turned = msgspec.structs.replace(files, config={"b": 2, "a": 1}, path="/elsewhere")
    other = msgspec.structs.replace(files, config={"a": 1, "b": 3})
    config = settings(dtype="float32", rank=2)
    own = rendezvous.hello(config, files)
    assert (own.rank, own.world_size, own.dtype) == (2, 3, "float32")
    assert own == rendezvous.hello(config, turned) != rendezvous.hello(config, other)


def test_ranks_of_this_machine() -> None:
    assert num_ranks_here(Config()) == 1
    assert num_ranks_here(Config(num_shard=4)) == 4
    assert num_ranks_here(settings(local_world_size=2)) == 2
