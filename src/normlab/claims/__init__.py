"""Claims: what is said of normalization, tested on real data.

>>> from normlab import claims
>>> claims.CLAIMS["identity"].source
'Ioffe and Szegedy, 2015'
"""

from normlab.claims.catalog import CLAIMS
from normlab.claims.check import FOLDER, check, find, last
from normlab.claims.claim import Claim, Part, Row
from normlab.claims.evidence import Evidence
from normlab.claims.page import page
from normlab.claims.result import Result, told
from normlab.claims.work import Work

__all__ = [
    "CLAIMS",
    "FOLDER",
    "Claim",
    "Evidence",
    "Part",
    "Result",
    "Row",
    "Work",
    "check",
    "find",
    "last",
    "page",
    "told",
]
