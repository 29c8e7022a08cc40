"""What a scenario may say of the host's policy: which message, of a channel in which state, is answered how.

Real hosts differ there, and some races turn on it. The defaults, and what an answer means, are the host's
(`hostproc.protocol.policy`); here are the names, so that a scenario is checked before any host runs.

    [policy]
    modifychannel.revoked = "refuse"
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from emu.scenario_text import Nonsense, Table, nearest, one_of, shown, type_name

ANSWERS: Final = ("silent", "refuse", "accept")
_GONE: Final = ("revoked", "reoffered")
_NOT_OPEN: Final = ("closed", "opening", "closing", "closing_reopen")
_REVOKING: Final = "revoking"
_UNLOADED: Final = "unloaded"

CELLS: Final[Mapping[str, tuple[str, ...]]] = {
    "openchannel": (*_GONE, _REVOKING, _UNLOADED),
    "closechannel": _GONE,
    "gpadl_header": (*_GONE, _REVOKING, _UNLOADED),
    "gpadl_teardown": (*_GONE, _REVOKING, _UNLOADED),
    "modifychannel": (*_GONE, *_NOT_OPEN, _REVOKING, _UNLOADED),
    "requestoffers": (_UNLOADED,),
    "tl_connect_request": (_UNLOADED,),
    "modify_connection": (_UNLOADED,),
    "pause": (_UNLOADED,),
    "unload": (_UNLOADED,),
}
"""The states in which there is a choice, by the kind of message.

Two of them are no states of a channel: `revoking` is the moment at which a channel is taken back while a request of
its guest's is under way, `unloaded` the time between an UNLOAD and the next INITIATE_CONTACT.
"""


def read_policy(entries: object, source: str) -> dict[str, str]:
    """The cells of a `[policy]` table as `KIND.STATE` to an answer; UserError names the cell and the cure."""
    top = Table(entries, source, "policy")
    flat = entries if isinstance(entries, dict) else {}
    policy: dict[str, str] = {}
    for key, value in flat.items():
        kind, dot, state = str(key).partition(".")
        if kind not in CELLS:
            raise top.complaint(kind, Nonsense(f"{shown(kind)} is no message of this table", nearest(kind, CELLS)))
        # A table of states, as TOML reads a dotted key; or the dotted key itself, as a configuration has it.
        states = {state: value} if dot else value
        if not isinstance(states, dict):
            what = f"{shown(value)} is {type_name(value)}, not a table of states"
            raise top.complaint(kind, Nonsense(what, f'write {kind}.{CELLS[kind][0]} = "refuse"'))
        for state, answer in states.items():
            if state not in CELLS[kind]:
                problem = Nonsense(f"{shown(state)} is no state with a choice", nearest(state, CELLS[kind]))
                raise top.complaint(f"{kind}.{state}", problem)
            policy[f"{kind}.{state}"] = top.read(f"{kind}.{state}", one_of(*ANSWERS), answer)
    return policy
