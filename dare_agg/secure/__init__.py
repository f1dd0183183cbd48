"""Secure sums: parties add up their survivors, the server sees only the sum.

Bonawitz et al. 2017 (malicious setting) with the graph of Bell et al. 2020, and TIES in one
sum by packed words. See SECURITY.md for what it protects and what not.
"""

from dare_agg.secure.aggregate import SecureMeasurements, Sums
from dare_agg.secure.identity import Identity, new_identity, read_identity, write_identity
from dare_agg.secure.local import LocalSum, secure_sum
from dare_agg.secure.packing import Quantiser, merge_sums
from dare_agg.secure.roster import (
    Roster,
    check_roster,
    make_roster,
    read_roster,
    sign_roster,
    write_roster,
)
from dare_agg.secure.server import SecureServer
from dare_agg.secure.terms import SecureTerms, decode_terms, secure_terms

__all__ = [
    "Identity",
    "LocalSum",
    "Quantiser",
    "Roster",
    "SecureMeasurements",
    "SecureServer",
    "SecureTerms",
    "Sums",
    "check_roster",
    "decode_terms",
    "make_roster",
    "merge_sums",
    "new_identity",
    "read_identity",
    "read_roster",
    "secure_sum",
    "secure_terms",
    "sign_roster",
    "write_identity",
    "write_roster",
]
