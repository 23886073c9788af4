"""Free ports: which ones are given, and that they can be listened on."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from mixquant.servers import ports


def test_they_are_free_and_different_and_the_system_gives_them_to_nobody() -> None:
    found = ports.free_ports(20)
    assert len(set(found)) == 20
    assert not set(found) & set(ports._handed_out())
    for port in found:
        with socket.socket() as one:
            one.bind(("127.0.0.1", port))


def test_one_that_is_taken_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, unwanted, free = ports.free_ports(3)
    monkeypatch.setattr(ports.random, "sample", lambda population, k: [taken, unwanted, free])
    with socket.socket() as other:
        other.bind(("127.0.0.1", taken))
        assert ports.free_ports(1, without=taken) == [unwanted]
        with pytest.raises(OSError, match="no 3 ports are free"):
            ports.free_ports(3)


def test_the_unwanted_one_is_not_among_the_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates: list[int] = []

    def sample(population: list[int], k: int) -> list[int]:
        candidates.extend(population)
        return population

    monkeypatch.setattr(ports.random, "sample", sample)
    ports.free_ports(1, without=ports.LOWEST + 1)
    assert ports.LOWEST in candidates
    assert ports.LOWEST + 1 not in candidates


def test_where_the_system_hands_out_all_of_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "range").write_text("1024\t65535\n")
    monkeypatch.setattr(ports, "_HANDED_OUT", tmp_path / "range")
    assert len(ports.free_ports(5)) == 5
    monkeypatch.setattr(ports, "_HANDED_OUT", tmp_path / "none")
    assert all(port < 49152 for port in ports.free_ports(5))
