"""Quantized arrays for JAX and Equinox."""

from . import formats as formats
from . import rules as rules
from ._array import AbstractScaledArray as AbstractScaledArray
from ._array import QuantizedArray as QuantizedArray
from ._dispatch import AuditRow as AuditRow
from ._dispatch import ImplicitArray as ImplicitArray
from ._dispatch import MaterializeError as MaterializeError
from ._dispatch import MaterializeWarning as MaterializeWarning
from ._dispatch import on_materialize as on_materialize
from ._dispatch import register as register
from ._dispatch import safe_delete as safe_delete
from ._dispatch import safe_materialize as safe_materialize
from ._dispatch import strict as strict
from ._implicit import Implicit as Implicit
from ._implicit import implicit as implicit
from ._implicit import is_implicit as is_implicit
from ._ste import ste as ste
from .audit import Audit as Audit
from .audit import audit as audit
from .formats import Array8B as Array8B
from .matmul import matmul_bf16_int8_weight_only as matmul_bf16_int8_weight_only
from .model import materialize as materialize
from .model import quantize as quantize
from .report import Report as Report
from .report import ReportRow as ReportRow
from .report import plan as plan
from .report import report as report


__version__ = "0.1.0"
