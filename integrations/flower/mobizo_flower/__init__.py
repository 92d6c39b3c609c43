"""Federated zeroth-order training: clients exchange a few numbers of every step, and stay the same bit for bit.

`Server` and `Client` are the protocol, as bytes, and `run_rounds` goes over any network; they need nothing but
`mobizo_compiler`. `mobizo_flower.flower` has the network that is Flower's.
"""

from mobizo_flower.client import Client
from mobizo_flower.errors import DamagedMessageError, ForeignMessageError, MessageError, OutOfRoundError
from mobizo_flower.ledger import Ledger
from mobizo_flower.rounds import Network, Reply, Traffic, run_rounds
from mobizo_flower.server import Outcome, Plan, Protocol, RoundReport, Server, Verdict

__all__ = [
    "Client",
    "DamagedMessageError",
    "ForeignMessageError",
    "Ledger",
    "MessageError",
    "Network",
    "OutOfRoundError",
    "Outcome",
    "Plan",
    "Protocol",
    "Reply",
    "RoundReport",
    "Server",
    "Traffic",
    "Verdict",
    "run_rounds",
]
