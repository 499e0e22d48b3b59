"""An independent reference of the TGIS request semantics.

Plain and slow on purpose: one request at a time, one token at a time, the whole sequence computed
again for every token with a Transformers model in float32. It shares no code with the server, so
that whatever both agree on is right twice. `tests/contract/test_oracle.py` holds it against
outputs recorded from TGIS itself.
"""

from tests.contract.oracle.model import Oracle, Step
from tests.contract.oracle.request import Limits, Params, RejectedError

VERSION = 1

__all__ = ["VERSION", "Limits", "Oracle", "Params", "RejectedError", "Step"]
